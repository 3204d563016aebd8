"""Values that leave a GPU for the host's memory while both go on: frames, latents, findings."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from wanexport.runtime.arrays import Array, is_on_gpu, is_torch


class HostCopy:
    """A copy of an array in the host's memory, begun at once and waited for where it is read.

    A tensor on a GPU goes to pinned memory on `stream`, after what the current stream holds; None
    is the current one, after which anything may write to the tensor. Anything else is copied here.
    """

    def __init__(self, value: Array, stream: Any = None) -> None:
        self._event: Any = None
        if not is_torch(value):
            self._host: Array = np.array(value)
        elif value.device.type == "cuda":
            self._begin(value.detach(), stream)
        else:
            self._host = value.detach().clone()

    def _begin(self, tensor: Any, stream: Any) -> None:
        import torch

        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        current = torch.cuda.current_stream(tensor.device)
        stream = stream or current
        if stream != current:
            stream.wait_stream(current)
            tensor.record_stream(stream)  # its memory is not another's before the copy is made
        with torch.cuda.stream(stream):
            self._host.copy_(tensor, non_blocking=True)
            # Who waits for it leaves the processor to others, as an encoder.
            self._event = torch.cuda.Event(blocking=True)
            self._event.record(stream)

    def is_there(self) -> bool:
        """Whether reading it waits for nothing."""
        return self._event is None or bool(self._event.query())

    def array(self) -> np.ndarray:
        """The copy, which is nobody else's; waits until it is whole."""
        if self._event is not None:
            self._event.synchronize()
        array: np.ndarray = self._host.numpy() if is_torch(self._host) else self._host
        return array


def finite(values: Sequence[Array]) -> HostCopy:
    """Of each array whether it has neither NaN nor Inf: bools [n], in one copy from the GPU."""
    found = [_is_finite(value) for value in values]
    on_gpu = next((value for value in found if is_on_gpu(value)), None)
    if on_gpu is None:
        return HostCopy(np.array([bool(value) for value in found]))
    import torch

    there = [torch.as_tensor(value).to(on_gpu.device, non_blocking=True) for value in found]
    return HostCopy(torch.stack(there))


def _is_finite(value: Array) -> Array:
    """A truth value, where the array is."""
    return value.isfinite().all() if is_torch(value) else np.isfinite(value).all()
