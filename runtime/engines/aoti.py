"""An AOTInductor engine: a Program's calls, each a compiled package, run in their order.

Nothing here compiles anything or imports Inductor: the packages are opened by libtorch's own
loader, and attention runs kernels that are in the bundle or in PyTorch.
"""

import platform
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from wanexport.runtime.bundle.manifest import EngineRecord
from wanexport.runtime.bundle.pinned_file import PinnedFile, pin
from wanexport.runtime.dtypes import DTYPES
from wanexport.runtime.engines.cached_kernels import attending_to
from wanexport.runtime.engines.device import (
    blank_input,
    capture_stream,
    gpu_or_cpu,
    launch_bound,
    on_device,
    to_device,
    zero_state,
)
from wanexport.runtime.engines.device_weights import DeviceWeights, device_weights
from wanexport.runtime.engines.engine import CLOSED, EngineOptions, Memory
from wanexport.runtime.engines.kernels import check_kernel
from wanexport.runtime.engines.operators import Kernel, attention_kernels, open_kernel
from wanexport.runtime.engines.processor import level_for, level_here, runs_here
from wanexport.runtime.engines.streamed_weights import StreamedWeights
from wanexport.runtime.errors import (
    BadRequest,
    BundleError,
    EngineFailure,
    WanExportError,
    WanExportWarning,
)
from wanexport.runtime.machine.temporary import check_temporary_folder
from wanexport.runtime.program import Program

# What compiled code depends on, of what `versions` says.
BINDING = ("device", "arch", "march", "instructions", "torch", "cuda")
OPTIONS = frozenset({"attention", "offload", "resident_blocks", "cuda_graph"})
_WARM_UPS, _TIMED = 2, 5  # calls of the repeated function
_T = TypeVar("_T")


class Regions:
    """The opened packages of one engine: code, without weights.

    `files` has the package of each of the Program's functions by its name; `kernels` are those of
    the kinds of attention, dtype is the engine's precision. Raises BundleError when a package
    cannot be opened, or is not what was pinned.
    """

    def __init__(
        self,
        files: Mapping[str, Path | PinnedFile],
        program: Program,
        kernels: Mapping[str, Kernel],
        device: torch.device,
        dtype: str = "fp32",
    ) -> None:
        self.program, self.kernels, self.device = program, kernels, device
        self.dtype: torch.dtype = getattr(torch, DTYPES[dtype].torch)
        check_temporary_folder(runs_code=True)
        self.runners = {name: _open(files[name], device) for name in program.functions}
        self.lock = threading.Lock()  # a runner serves one caller at a time

    def memory(self) -> Memory:
        """What a session keeps that has not begun: a state of zeros."""
        return Memory(zero_state(self.program, self.dtype, self.device))

    def bind(
        self, tensors: Mapping[str, Tensor], streamed: StreamedWeights | None = None
    ) -> "BoundRegions":
        """The regions with the weights of one expert, the layers of a call from streamed ones.

        Raises BundleError when a parameter is not among them.
        """
        return BoundRegions(self, tensors, streamed)


class BoundCall(NamedTuple):
    """One layer of a call: its function, and where its arguments and results are."""

    run: Callable[[Sequence[Tensor]], Sequence[Tensor]]
    parameters: AbstractContextManager[list[Tensor]]  # on the device within
    reads: list[int]  # slots
    writes: list[int]
    state: tuple[str, ...]


class BoundRegions:
    """The forward of one expert; every tensor is on the device.

    Names are resolved to slots here, so that a forward is calls and nothing else.
    """

    def __init__(
        self,
        regions: Regions,
        tensors: Mapping[str, Tensor],
        streamed: StreamedWeights | None = None,
    ) -> None:
        self.regions, program = regions, regions.program
        self.slots = {name: i for i, name in enumerate(_names(program))}
        self.calls: dict[str, list[BoundCall]] = {}
        for call in program.calls:
            bound = self.calls.setdefault(call.when, [])
            reads, writes = ([self.slots[n] for n in own] for own in (call.reads, call.writes))
            for names, state in call.layers():
                run = regions.runners[call.function].run
                parameters: AbstractContextManager[list[Tensor]]
                layer = None if streamed is None else streamed.parts.layer_of(names)
                if streamed is not None and layer is not None:
                    _found(streamed.entries, names)
                    parameters = streamed.layer(layer, names)
                else:
                    parameters = nullcontext(_found(tensors, names))
                bound.append(BoundCall(run, parameters, reads, writes, state))
        self.output = self.slots[next(iter(program.outputs))]

    def __call__(
        self, inputs: Mapping[str, Tensor], memory: Memory, moment: str = "step"
    ) -> Tensor:
        """The velocity, None of a moment that gives none; what the prompt's calls write is kept in
        memory."""
        values: list[Any] = [None] * len(self.slots)
        count = attending_to(memory.attended)
        with attention_kernels(self.regions.kernels), count, torch.no_grad():
            for name, tensor in inputs.items():
                values[self.slots[name]] = tensor
            if memory.values is None:
                memory.values = self._written("prompt", values, memory)
            for name, tensor in memory.values.items():
                values[self.slots[name]] = tensor
            _run(self.calls.get(moment, ()), values, memory)
        return values[self.output]

    def at(self, moment: str, inputs: Mapping[str, Tensor], memory: Memory) -> dict[str, Tensor]:
        """What the calls of one moment write, by name; nothing is kept but the state."""
        values: list[Any] = [None] * len(self.slots)
        with attention_kernels(self.regions.kernels), torch.no_grad():
            for name, tensor in inputs.items():
                values[self.slots[name]] = tensor
            return self._written(moment, values, memory)

    def _written(self, moment: str, values: list[Any], memory: Memory) -> dict[str, Tensor]:
        calls = self.calls.get(moment, ())
        _run(calls, values, memory)
        written = {slot for call in calls for slot in call.writes}
        return {name: values[slot] for name, slot in self.slots.items() if slot in written}

    def warm_up(self, inputs: Mapping[str, Tensor], memory: Memory) -> tuple[float, float]:
        """Run every kernel once or more, and return the launch and GPU time in seconds of one layer
        of the call that repeats most.

        The first call of a kernel loads it and sets libraries up, which would fall on a first step.
        On a CPU there is nothing to set up, and what it would take is as long as a step.
        """
        if self.regions.device.type != "cuda":
            return 0.0, 0.0
        values: list[Any] = [None] * len(self.slots)
        for name, tensor in inputs.items():
            values[self.slots[name]] = tensor
        with attention_kernels(self.regions.kernels), torch.no_grad():
            for layers in self.layers():
                _run(layers[:1] * (_WARM_UPS if len(layers) > 1 else 1), values, memory)
            calls = self.regions.program.calls
            of_steps = [own for call, own in zip(calls, self.layers()) if call.when == "step"]
            layer = max(of_steps or self.layers(), key=len)[:1]
            torch.cuda.synchronize(self.regions.device)
            started = time.perf_counter()
            _run(layer * _TIMED, values, memory)
            launched = time.perf_counter()
            torch.cuda.synchronize(self.regions.device)
        return (launched - started) / _TIMED, (time.perf_counter() - started) / _TIMED

    def layers(self) -> list[list[BoundCall]]:
        """The layers of each call, in the Program's order."""
        remaining = {when: iter(calls) for when, calls in self.calls.items()}
        return [
            [next(remaining[call.when]) for _ in range(call.repeat)]
            for call in self.regions.program.calls
        ]


def _names(program: Program) -> dict[str, None]:
    """Every name that a call reads or writes, once, in order of appearance."""
    names = dict.fromkeys(program.inputs)
    for call in program.calls:
        names |= dict.fromkeys((*call.reads, *call.writes))
    return names


def _found(tensors: Mapping[str, _T], names: Sequence[str]) -> list[_T]:
    try:
        return [tensors[name] for name in names]
    except KeyError as error:
        raise BundleError(
            f"the engine takes a parameter {error} that its weights lack: run wanexport build again"
        ) from error


def _run(calls: Sequence[BoundCall], values: list[Any], memory: Memory) -> None:
    """Run calls in order over the values' slots; the state is written in place."""
    for run, held, reads, writes, state in calls:
        kept = [memory.state[name] for name in state]
        with held as parameters:
            results = run([*parameters, *[values[slot] for slot in reads], *kept])
        for slot, result in zip(writes, results):
            values[slot] = result


class AotiEngine:
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
            zeros = {n: blank_input(spec, self.device_of) for n, spec in inputs.items()}
            self.launch_seconds, self.block_seconds = self.bound.warm_up(zeros, self.memory())
            if cuda_graph is None:
                cuda_graph = launch_bound(self.launch_seconds, self.block_seconds)
            if cuda_graph and self.device_of.type == "cuda" and regions.program.is_plain:
                self._capture(self.bound, zeros)

    @property
    def device(self) -> str:
        """PyTorch's name of the device."""
        return str(self.device_of)

    def array(self, value: Any) -> Tensor:
        """An fp32 tensor on the device."""
        return to_device(value, self.device_of)

    def memory(self) -> Memory:
        """What a new session keeps: a state of zeros."""
        return self.regions.memory()

    def use(self, weights: PinnedFile) -> None:
        """Read the weights of a file now, when calls that run have ended."""
        with self._held(weights):
            pass

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


def refusal(record: EngineRecord, device: str, options: EngineOptions, rebuild: str) -> str:
    """Why this machine cannot execute the engine on a device; empty when it can.

    rebuild is the command that makes an engine for it.
    """
    try:
        differing = mismatches(record.target, device)
    except WanExportError as error:
        return f"engine {record.name} is for a GPU: {error}"
    if not differing:
        return ""
    found = "; ".join(differing)
    return f"engine {record.name} was compiled for {found}: build it here with {rebuild}"


def _open(file: Path | PinnedFile, device: torch.device) -> Any:
    # Straight from libtorch: torch._inductor.aoti_load_package imports the compiler, and may run
    # the host's g++ to learn what the processor can do.
    index = device.index if device.type == "cuda" else -1
    file = pin(file)
    with file.opened() as descriptor:
        # The very file, whatever its name leads to by then.
        path = f"/proc/self/fd/{descriptor}"
        try:
            return torch._C._aoti.AOTIModelPackageLoader(path, "model", True, 1, index)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise BundleError(f"libtorch cannot open {file.path}: {reason}") from error


def versions(device: str) -> dict[str, str]:
    """What an engine compiled for a device here is bound to; the manifest records it and `load`
    compares. The device is PyTorch's name, `cpu`, `cuda` or `cuda:1`.

    Raises EngineFailure when it is not there.
    """
    if device == "cpu":
        return {
            "device": "cpu",
            "arch": platform.machine(),
            "march": level_for("cpu"),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "torch": torch.__version__,
        }
    gpu = gpu_or_cpu(device)
    major, minor = torch.cuda.get_device_capability(gpu)
    return {
        "device": "cuda",
        "arch": f"sm{major}{minor}",
        "march": level_for("cuda"),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "gpu": torch.cuda.get_device_name(gpu),
    }


def mismatches(target: Mapping[str, str], device: str | None = None) -> list[str]:
    """What of an engine's target is not so here, as `torch 2.11.0, here 2.13.0`.

    Raises EngineFailure when its device is not there.
    """
    here = versions(device or target["device"])
    # A package runs on any processor that has the instructions it was compiled for.
    here["march"] = target["march"] if runs_here(target.get("march", "?")) else level_here()
    differing = [name for name in BINDING if here.get(name) != target.get(name)]
    return [f"{name} {target.get(name)}, here {here.get(name)}" for name in differing]
