"""The compiled packages of an AOTInductor engine: opened, bound to weights, and run in order.

Nothing here compiles anything or imports Inductor: the packages are opened by libtorch's own
loader, and attention runs kernels that are in the bundle or in PyTorch.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from wanexport.runtime.bundle.pinned_file import PinnedFile, pin
from wanexport.runtime.engines.cached_kernels import attending_to
from wanexport.runtime.engines.device import torch_dtype, zero_state
from wanexport.runtime.engines.engine import Memory
from wanexport.runtime.engines.operators import Kernel, attention_kernels
from wanexport.runtime.engines.streamed_weights import StreamedWeights
from wanexport.runtime.errors import BundleError
from wanexport.runtime.machine.temporary import check_temporary_folder
from wanexport.runtime.program import Program

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
        self.dtype = torch_dtype(dtype)
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
