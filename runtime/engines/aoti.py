"""An AOTInductor engine: a Program's calls, each a compiled package, run in their order."""

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from wanexport.runtime.bundle.manifest import EngineRecord
from wanexport.runtime.bundle.pinned_file import PinnedFile
from wanexport.runtime.engines.aoti_regions import BoundRegions, Regions
from wanexport.runtime.engines.aoti_target import refusal
from wanexport.runtime.engines.device import (
    blank_inputs,
    capture_stream,
    gpu_or_cpu,
    launch_bound,
    on_device,
)
from wanexport.runtime.engines.device_engine import DeviceEngine
from wanexport.runtime.engines.device_weights import DeviceWeights, device_weights
from wanexport.runtime.engines.engine import CLOSED, EngineOptions, Memory
from wanexport.runtime.engines.kernels import check_kernel
from wanexport.runtime.engines.operators import Kernel, open_kernel
from wanexport.runtime.engines.streamed_weights import StreamedWeights
from wanexport.runtime.errors import BadRequest, EngineFailure, WanExportError, WanExportWarning

__all__ = [
    "OPTIONS",
    "AotiEngine",
    "attention_of",
    "import_library",
    "open_engines",
    "refusal",
    "streamed_engines",
]
OPTIONS = frozenset({"attention", "offload", "resident_blocks", "cuda_graph"})


class AotiEngine(DeviceEngine):
    """Calls the regions with one expert's weights; torch tensors on the device in and out.

    `weights` hold by turns the files that calls name: with --offload two engines share one buffer.
    cuda_graph None captures a graph when launching takes as long as running; a Program with state,
    or with calls that run once a prompt, is never captured, nor are layers that are streamed: the
    copies of one forward are begun in the one before.
    """

    def __init__(
        self,
        regions: Regions,
        weights: DeviceWeights | StreamedWeights,
        file: PinnedFile,
        *,
        cuda_graph: bool | None = None,
    ) -> None:
        self.regions, self.file = regions, file
        self.weights: DeviceWeights | StreamedWeights | None = weights
        self.device_of = regions.device
        streamed = weights if isinstance(weights, StreamedWeights) else None
        self.bound: BoundRegions | None = regions.bind(weights.tensors, streamed)
        cuda_graph = False if streamed else cuda_graph
        self.graph: torch.cuda.CUDAGraph | None = None
        self._inputs: dict[str, Tensor] = {}  # of the graph, as its output
        self._output: Tensor | None = None
        inputs = regions.program.inputs
        # Of a caller in inference mode, calls outside it could not write them.
        with torch.inference_mode(False), on_device(self.device_of):
            zeros = blank_inputs(inputs, self.device_of)
            self.launch_seconds, self.block_seconds = self.bound.warm_up(zeros, self.memory())
            if cuda_graph is None:
                cuda_graph = launch_bound(self.launch_seconds, self.block_seconds)
            if cuda_graph and self.device_of.type == "cuda" and regions.program.is_plain:
                self._capture(self.bound, zeros)

    def memory(self) -> Memory:
        """What a new session keeps: a state of zeros."""
        return self.regions.memory()

    def __call__(
        self,
        inputs: Mapping[str, Tensor],
        weights: PinnedFile | None = None,
        memory: Memory | None = None,
        moment: str = "step",
    ) -> Any:
        """Return the velocity, of a commit None; the host waits for nothing.

        The caller's current CUDA stream does the work.
        Raises EngineFailure when the device has too little memory, and after `close`.
        """
        file = weights or self.file
        memory = self.memory() if memory is None else memory
        with self._held(file), self.regions.lock, on_device(self.device_of):
            if self.bound is None:
                raise EngineFailure(CLOSED)
            if self.graph is not None:
                return self._replay(self.graph, inputs)
            if memory.weights != file:  # what the prompt's calls wrote is of other weights
                memory.values, memory.weights = None, file
            return self.bound(inputs, memory, moment)

    def close(self) -> None:
        """Let go of weights and captured memory; a call then raises EngineFailure."""
        with self.regions.lock:
            self._inputs, self._output = {}, None
            self.bound = self.graph = self.weights = None

    def _held(self, file: PinnedFile) -> AbstractContextManager[None]:
        weights = self.weights
        if weights is None:
            raise EngineFailure(CLOSED)
        return weights.held(file)

    def _replay(self, graph: torch.cuda.CUDAGraph, given: Mapping[str, Tensor]) -> Tensor:
        """Run the graph in the order of the caller's stream, after what another replay left."""
        caller = torch.cuda.current_stream(self.device_of)
        caller.wait_event(self._idle)
        try:
            for name, static in self._inputs.items():
                static.copy_(given[name])
            graph.replay()
            assert self._output is not None
            return self._output.clone()
        finally:  # what was launched before a failure uses them too
            self._idle.record(caller)

    def _capture(self, bound: BoundRegions, inputs: dict[str, Tensor]) -> None:
        self._inputs, self._idle = inputs, torch.cuda.Event()
        self.graph = torch.cuda.CUDAGraph()
        # Other threads of the process may use the GPU meanwhile.
        with torch.cuda.graph(
            self.graph,
            stream=capture_stream(self.device_of),
            capture_error_mode="thread_local",
        ):
            self._output = bound(inputs, Memory())


def open_engines(
    record: EngineRecord,
    files: Mapping[str, PinnedFile],
    weights: Callable[[], Mapping[str, PinnedFile]],
    options: EngineOptions,
    device: str,
) -> dict[str, AotiEngine]:
    """The engine of each expert; weights gives the files by expert.

    With offload the experts take turns on the device, in one buffer, or layer by layer. Raises
    BadRequest for a kernel of attention that cannot run there, and for a CPU that is to stream,
    BundleError when a file is not what it was, EngineFailure when the device is too small.
    """
    check_kernel(options.attention, record.target, record.dtype)
    place = gpu_or_cpu(device)
    kernels = attention_of(record, files, options.attention)
    if options.offload == "blocks":
        _check_streaming(record, place, options)
    regions = Regions(files, record.program, kernels, place, record.dtype)
    if options.offload == "blocks":
        return streamed_engines(regions, weights(), options)
    held: DeviceWeights | None = None
    engines = {}
    for expert, file in weights().items():
        if held is None or not options.offload:
            held = device_weights(file, place, private=options.offload is not None)
        engines[expert] = AotiEngine(regions, held, file, cuda_graph=options.cuda_graph)
    return engines


def streamed_engines(
    regions: Regions, files: Mapping[str, PinnedFile], options: EngineOptions
) -> dict[str, AotiEngine]:
    """The engine of each expert; all share what is on the device, and the host has their weights.

    Of the layers that are to stay, those do that fit beside what the engines took to run once.
    """
    first, place = next(iter(files.values())), regions.device
    if place.type == "cuda":
        torch.cuda.empty_cache()
    held = StreamedWeights(first, regions.program, place)
    before = torch.cuda.memory_reserved(place) if place.type == "cuda" else 0
    engines = {e: AotiEngine(regions, held, file) for e, file in files.items()}
    beside = torch.cuda.memory_reserved(place) - before if place.type == "cuda" else 0
    if place.type == "cuda":  # what stays is not to lie in pieces of what a forward needs
        torch.cuda.empty_cache()
    held.keep(options.resident_blocks or 0, beside=beside)
    for file in files.values():
        held.read_ahead(file)
    return engines


def _check_streaming(record: EngineRecord, place: torch.device, options: EngineOptions) -> None:
    """Raise BadRequest where layers cannot be streamed."""
    if place.type != "cuda":
        raise BadRequest(
            f"engine {record.name} runs on a CPU, from whose memory blocks are streamed to a GPU: "
            f"leave --offload blocks out"
        )
    if options.cuda_graph:
        raise BadRequest(
            f"engine {record.name} streams blocks, which no captured CUDA graph does: leave "
            f"--cuda-graph or --offload blocks out"
        )


def attention_of(
    record: EngineRecord, files: Mapping[str, PinnedFile], chosen: str | None
) -> dict[str, Kernel]:
    """The kernel of each kind of attention; one that cannot be had here is replaced aloud.

    chosen is that of self-attention, or to a cache, in place of the recorded one.
    """
    library = files.get("flash_attention")
    fallback = "cudnn" if record.target["device"] == "cuda" else "sdpa"
    kernels = {}
    for kind, recorded in record.details.attention.items():
        if chosen and kind in ("self", "cache"):
            kernels[kind] = open_kernel(chosen, library, kind)
            continue
        try:
            kernels[kind] = open_kernel(recorded, library, kind)
        except WanExportError as error:
            warnings.warn(
                f"attention runs on {fallback} instead of {recorded}, which is slower: {error}",
                WanExportWarning,
                stacklevel=2,
            )
            kernels[kind] = open_kernel(fallback, library, kind)
    return kernels


def import_library(backend: str) -> None:
    """Nothing beside PyTorch, which this file has imported, runs the engines."""
