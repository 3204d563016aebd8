"""A TensorRT engine whose Program has moments: a plan for each, and a state that sessions have.

A plan writes nothing in place. It is given the addresses of a session's state, and gives what of it
is new: of a cache the rows of a chunk, which are copied to their places on the same stream.
"""

import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wanexport.runtime.bundle.manifest import EngineRecord
from wanexport.runtime.bundle.pinned_file import PinnedFile, pin
from wanexport.runtime.engines.device import (
    gpu_or_cpu,
    on_device,
    to_device,
    torch_dtype,
    zero_state,
)
from wanexport.runtime.engines.device_engine import DeviceEngine
from wanexport.runtime.engines.device_weights import DeviceWeights, device_weights
from wanexport.runtime.engines.engine import CLOSED, EngineOptions, Memory
from wanexport.runtime.engines.moments import Ends, call_moment
from wanexport.runtime.engines.tensorrt_buffers import Buffers
from wanexport.runtime.engines.tensorrt_plan import Plan
from wanexport.runtime.errors import BundleError, EngineFailure
from wanexport.runtime.program import (
    ENGINE_DTYPE,
    NEXT,
    PLACE_OF_ROWS,
    ROWS,
    WHOLE,
    Call,
    Program,
    TensorSpec,
)


class PlanSession:
    """The plan of one moment with one expert's weights; tensors on the device in and out.

    Inputs of the Program are copied to the buffers'. State, and values of another moment, are read
    where they lie; what the plan gives lies in new tensors.
    Raises BundleError when the plan does not fit, EngineFailure when TensorRT refuses a tensor.
    """

    def __init__(
        self,
        plan: Plan,
        program: Program,
        call: Call,
        dtype: str,
        weights: DeviceWeights,
        buffers: Buffers,
    ) -> None:
        self.plan, self.buffers = plan, buffers
        ends = _ends(plan, program, call, dtype)
        given = {n for n in ends if n in call.writes or n.endswith((NEXT, ROWS))}
        self.inputs: Ends = {n: (s.shape, s.dtype) for n, s in ends.items() if n not in given}
        self.outputs: Ends = {n: (s.shape, s.dtype) for n, s in ends.items() if n in given}
        self.context = plan.context({**weights.tensors, **buffers.inputs}, buffers.activations)
        self._bound: dict[str, int] = {}  # addresses that differ between calls

    def __call__(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """The outputs in order; the host does not wait for them.

        Of inputs those are taken that the plan has.
        """
        buffers, free = self.buffers, {}
        for name in self.inputs:
            if name in buffers.inputs:
                buffers.inputs[name].copy_(inputs[name])
            else:
                free[name] = inputs[name]
        with torch.inference_mode(False):  # of a caller in it, others could not write the state
            outputs = {name: _new(end, buffers.device) for name, end in self.outputs.items()}
        for name, tensor in {**free, **outputs}.items():
            if self._bound.get(name) != (address := tensor.data_ptr()):
                self.plan.bind(self.context, name, address)
                self._bound[name] = address
        with buffers.stream() as handle:
            self.plan.execute(self.context, handle)
        return [*outputs.values()]


class MomentsEngine(DeviceEngine):
    """Calls a plan for each moment with one expert's weights; torch tensors on the device.

    `weights` hold by turns the files that calls name. Each plan runs once here, which loads its
    kernels. No CUDA graph is captured: the state of a session is where the session has it.
    Raises BundleError when a plan does not fit, EngineFailure when TensorRT fails.
    """

    def __init__(
        self,
        plans: Mapping[str, Plan],
        program: Program,
        dtype: str,
        buffers: Buffers,
        weights: DeviceWeights,
        file: PinnedFile,
    ) -> None:
        self.program, self.dtype, self.file, self.device_of = program, dtype, file, buffers.device
        self.buffers: Buffers | None = buffers
        self.weights: DeviceWeights | None = weights
        # Before contexts and what is bound to them go: an execution may still use them.
        weakref.finalize(self, buffers.idle.synchronize)
        with buffers.turn():
            self.sessions = {
                call.name: PlanSession(plans[call.name], program, call, dtype, weights, buffers)
                for call in program.calls
            }
        memory = self.memory()
        for call in program.calls:
            if call.when != "prompt":  # which another moment's first call runs
                self(buffers.inputs, memory=memory, moment=call.when)
        for plan in plans.values():
            plan.save_kernels()

    def memory(self) -> Memory:
        """What a new session keeps: a state of zeros."""
        with on_device(self.device_of):
            return Memory(zero_state(self.program, torch_dtype(self.dtype), self.device_of))

    def __call__(
        self,
        inputs: Mapping[str, Tensor],
        weights: PinnedFile | None = None,
        memory: Memory | None = None,
        moment: str = "step",
    ) -> Any:
        """Return the velocity, of a commit None; the caller's current CUDA stream does the work,
        the host waits not.

        Raises EngineFailure when TensorRT fails, and after `close`.
        """
        file, buffers = weights or self.file, self.buffers
        if buffers is None:
            raise EngineFailure(CLOSED)
        memory = self.memory() if memory is None else memory
        with self._held(file), buffers.turn():
            if self.buffers is None:
                raise EngineFailure(CLOSED)
            return call_moment(self.program, self.sessions, inputs, file, memory, moment)

    def close(self) -> None:
        """Let go of contexts, buffers and weights; a call then raises EngineFailure."""
        buffers = self.buffers
        if buffers is not None:
            with buffers.turn():
                buffers.idle.synchronize()
                self.sessions = {}
                self.weights = self.buffers = None

    def _held(self, file: PinnedFile) -> AbstractContextManager[None]:
        weights = self.weights
        if weights is None:
            raise EngineFailure(CLOSED)
        return weights.held(file)


def open_moments(
    record: EngineRecord,
    plans: Mapping[str, Plan],
    weights: Mapping[str, PinnedFile],
    options: EngineOptions,
    device: torch.device,
) -> dict[str, MomentsEngine]:
    """The engine of each expert; plans are by the Program's calls, weights by expert.

    Raises BundleError when a plan does not fit, EngineFailure when the GPU is too small.
    """
    program, files = record.program, weights.values()
    buffers = _checked_buffers(plans, program, record.dtype, files, device)
    held: DeviceWeights | None = None
    engines = {}
    for expert, file in weights.items():
        if not (held and options.offload):
            held = device_weights(file, device, private=options.offload is not None)
        engines[expert] = MomentsEngine(plans, program, record.dtype, buffers, held, file)
    return engines


def run_calls(
    flavour: str,
    paths: Mapping[str, Path],
    weights: Path,
    program: Program,
    dtype: str,
    calls: Sequence[tuple[str, Mapping[str, Any]]],
    *,
    device: str = "cuda",
    version_compatible: bool = False,
) -> Any:
    """The velocity of the last of these calls, in numpy, of one session that begins here; paths are
    of plans by the Program's calls. Leaves nothing on the GPU."""
    place, file = gpu_or_cpu(device), pin(weights)
    plans = {
        name: Plan(flavour, path, place, version_compatible=version_compatible)
        for name, path in paths.items()
    }
    buffers = _checked_buffers(plans, program, dtype, [file], place)
    engine = MomentsEngine(plans, program, dtype, buffers, device_weights(file, place), file)
    memory, velocity = engine.memory(), None
    for moment, inputs in calls:
        given = {
            name: to_device(value, place, torch_dtype(program.inputs[name].dtype))
            for name, value in inputs.items()
        }
        velocity = engine(given, memory=memory, moment=moment)
    assert velocity is not None
    return velocity.cpu().numpy()


def _checked_buffers(
    plans: Mapping[str, Plan],
    program: Program,
    dtype: str,
    files: Iterable[PinnedFile],
    device: torch.device,
) -> Buffers:
    """The buffers of plans that fit the Program and these weights. Raises as open_moments does."""
    for call in program.calls:
        plan = plans[call.name]
        for file in files:
            plan.check(_ends(plan, program, call, dtype), file, reads_all=False)
    _check_state(plans, program)
    size = max(plan.activation_bytes for plan in plans.values())
    return Buffers(program.inputs, {}, size, device)


def _check_state(plans: Mapping[str, Plan], program: Program) -> None:
    """Raise BundleError where a session would keep zeros of a state: no plan gives any of it."""
    given = {name for plan in plans.values() for name in plan.tensors}
    for state in program.states():
        if not given & {state + NEXT, state + ROWS}:
            folder = plans[WHOLE].path.parent
            raise BundleError(
                f"no plan in {folder} gives {state}{NEXT} or {state}{ROWS}, which a session keeps: "
                f"run wanexport build again"
            )


def _ends(plan: Plan, program: Program, call: Call, dtype: str) -> dict[str, TensorSpec]:
    """What the plan of a moment takes and gives beside parameters, by the Program.

    Of the state it has what it reads and what it makes anew; rows are as many as it says, where
    these are whole slots.
    """
    specs = {**program.inputs, **program.values, **program.outputs}
    ends = {name: specs[name] for name in (*call.reads, *call.writes)}
    for state in call.state:
        spec = program.state[state]
        ends |= {n: spec for n in (state, state + NEXT) if n in plan.tensors}
        if found := plan.tensors.get(state + ROWS):
            ends[state + ROWS] = _rows(program, spec, found)
    return {
        name: TensorSpec(spec.shape, dtype if spec.dtype == ENGINE_DTYPE else spec.dtype)
        for name, spec in ends.items()
    }


def _rows(program: Program, state: TensorSpec, found: TensorSpec) -> TensorSpec:
    """What a plan may give of a state's rows: those of as many whole slots as a call fills."""
    (slots,) = program.inputs[PLACE_OF_ROWS].shape
    batch, tokens, *rest = state.shape
    count = found.shape[1] if len(found.shape) > 1 else 0
    fits = count >= slots and count % slots == 0 and tokens % (count // slots) == 0
    return TensorSpec((batch, count if fits else slots, *rest), state.dtype)


def _new(end: tuple[tuple[int, ...], str], device: torch.device) -> Tensor:
    return torch.empty(end[0], dtype=torch_dtype(end[1]), device=device)
