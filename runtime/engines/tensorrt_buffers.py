"""Device memory at fixed addresses, which the plans of a TensorRT engine use by turns."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from wanexport.runtime.engines.device import blank_inputs, on_device
from wanexport.runtime.engines.device_weights import check_room
from wanexport.runtime.program import TensorSpec


class Buffers:
    """Device memory that the plans of an engine use by turns: inputs, outputs, activations.

    A turn is in the caller's stream and starts when that before it has ended, in whatever stream.
    """

    def __init__(
        self,
        inputs: Mapping[str, TensorSpec],
        outputs: Mapping[str, TensorSpec],
        size: int,
        device: torch.device,
    ) -> None:
        advice = "build one of a smaller --resolution or fewer --frames"
        check_room(size, device, "the engine's activation memory", advice)
        self.device = device
        # Of a caller in inference mode, calls outside it could not write them.
        with on_device(device), torch.inference_mode(False):
            self.inputs = blank_inputs(inputs, device)
            self.outputs = blank_inputs(outputs, device)
            self.activations = torch.empty(max(1, size), dtype=torch.uint8, device=device)
        self.lock = threading.Lock()
        self.own_stream, self.idle = torch.cuda.Stream(device), torch.cuda.Event()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Have the buffers for what the caller's current stream is given meanwhile."""
        with self.lock, on_device(self.device):
            caller = torch.cuda.current_stream(self.device)
            caller.wait_event(self.idle)
            try:
                yield
            finally:  # what was launched before a failure uses them too
                self.idle.record(caller)

    @contextmanager
    def stream(self) -> Iterator[int]:
        """Handle of the caller's current stream, or of one of our own between its neighbours where
        that is the default: there TensorRT makes the host wait."""
        caller = torch.cuda.current_stream(self.device)
        if caller.cuda_stream:
            yield caller.cuda_stream
            return
        self.own_stream.wait_stream(caller)
        try:
            yield self.own_stream.cuda_stream
        finally:
            caller.wait_stream(self.own_stream)
