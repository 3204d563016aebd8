"""A TensorRT engine, of either flavour: one plan, whose parameters are inputs that are bound once.

A call copies its inputs into fixed buffers and the velocity out of one, on the GPU: TensorRT wants
addresses aligned to 256 bytes, which a caller's view need not have, and a CUDA graph wants them to
stay. Nothing goes through the host, and the host does not wait. Engines of several moments are in
`tensorrt_moments.py`.
"""

import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wanexport.runtime.bundle.details import is_plan
from wanexport.runtime.bundle.manifest import EngineRecord
from wanexport.runtime.bundle.pinned_file import PinnedFile, pin
from wanexport.runtime.engines.cache_folder import cache_folder
from wanexport.runtime.engines.device import gpu_or_cpu, launch_bound, to_device
from wanexport.runtime.engines.device_engine import DeviceEngine
from wanexport.runtime.engines.device_weights import DeviceWeights, device_weights
from wanexport.runtime.engines.engine import CLOSED, Engine, EngineOptions, Memory
from wanexport.runtime.engines.tensorrt_buffers import Buffers
from wanexport.runtime.engines.tensorrt_library import FLAVOURS, import_tensorrt
from wanexport.runtime.engines.tensorrt_moments import open_moments
from wanexport.runtime.engines.tensorrt_plan import OUTPUT, Plan
from wanexport.runtime.engines.tensorrt_target import arch
from wanexport.runtime.engines.tensorrt_target import refusal as target_refusal
from wanexport.runtime.errors import BadRequest, BundleError, EngineFailure
from wanexport.runtime.program import WHOLE, TensorSpec
from wanexport.runtime.wan_config import EXPERTS

OPTIONS = frozenset({"offload", "cuda_graph"})
_BAKED = (
    "{} holds its weights inside and can neither offload nor change them: build one without "
    "--bake-weights"
)
_LONG = 10.0  # seconds of the first execution, beyond which no launch is worth measuring


class TensorRtEngine(DeviceEngine):
    """Executes a plan with one expert's weights; torch tensors on the device in and out.

    `weights` hold by turns the files that calls name: with --offload two engines share one buffer.
    They and `file` are None where weights were baked in. The plan runs once here, which loads its
    kernels; cuda_graph None captures a graph when launching takes as long as running.
    Raises BundleError when TensorRT refuses a tensor, EngineFailure when it fails.
    """

    def __init__(
        self,
        plan: Plan,
        buffers: Buffers,
        weights: DeviceWeights | None,
        file: PinnedFile | None,
        *,
        cuda_graph: bool | None = None,
    ) -> None:
        self.plan, self.file, self.device_of = plan, file, buffers.device
        self.buffers: Buffers | None = buffers
        self.weights = weights
        self.graph: torch.cuda.CUDAGraph | None = None
        # Before the context and the memory bound to it go: an execution may still use them.
        weakref.finalize(self, buffers.idle.synchronize)
        tensors = {**(weights.tensors if weights else {}), **buffers.inputs, **buffers.outputs}
        with buffers.turn():
            self.context = plan.context(tensors, buffers.activations)
            self.launch_seconds, self.seconds = self._warm_up(buffers)
            if cuda_graph is None:
                cuda_graph = launch_bound(self.launch_seconds, self.seconds)
            if cuda_graph:
                self._capture(buffers)
        plan.save_kernels()

    def memory(self) -> Memory:
        """Nothing: a plan keeps no state."""
        return Memory()

    def _held(self, file: PinnedFile | None) -> AbstractContextManager[None]:
        weights = self.weights
        if self.buffers is None:
            raise EngineFailure(CLOSED)
        if weights is None and file is not None:
            raise BadRequest(_BAKED.format(self.plan.path))
        if weights is None or self.file is None:
            return nullcontext()
        return weights.held(file or self.file)

    def __call__(
        self,
        inputs: Mapping[str, Tensor],
        weights: PinnedFile | None = None,
        memory: Memory | None = None,
        moment: str = "step",
    ) -> Tensor:
        """Return the velocity; the caller's current CUDA stream does the work, the host waits not.

        Raises EngineFailure when TensorRT fails, and after `close`.
        """
        buffers = self.buffers
        if buffers is None:
            raise EngineFailure(CLOSED)
        with self._held(weights), buffers.turn():
            if self.buffers is None:
                raise EngineFailure(CLOSED)
            for name, buffer in buffers.inputs.items():
                buffer.copy_(inputs[name])
            if self.graph is None:
                self._execute(buffers)
            else:
                self.graph.replay()
            return buffers.outputs[OUTPUT].clone()

    def close(self) -> None:
        """Let go of context, buffers and weights; a call then raises EngineFailure."""
        buffers = self.buffers
        if buffers is not None:
            with buffers.turn():
                buffers.idle.synchronize()
                self.buffers = self.context = self.graph = self.weights = None

    @property
    def device_memory(self) -> dict[str, int]:
        """Bytes on the device: of the activations, which experts share, and of the weights."""
        weights = self.plan.weights_bytes
        if self.weights is not None:
            weights += self.weights.buffer.nbytes
        activations = self.buffers.activations.nbytes if self.buffers is not None else 0
        return {"activations": activations, "weights": weights}

    def _execute(self, buffers: Buffers) -> None:
        with buffers.stream() as handle:
            self.plan.execute(self.context, handle)

    def _warm_up(self, buffers: Buffers) -> tuple[float, float]:
        """Seconds to launch the plan and to run it, which the first execution would not tell: it
        loads kernels. One that is long is not repeated, and its launch counts nothing."""
        _, first = self._timed_execution(buffers)
        return (0.0, first) if first > _LONG else self._timed_execution(buffers)

    def _timed_execution(self, buffers: Buffers) -> tuple[float, float]:
        torch.cuda.synchronize(buffers.device)
        started = time.perf_counter()
        self._execute(buffers)
        launched = time.perf_counter()
        torch.cuda.synchronize(buffers.device)
        return launched - started, time.perf_counter() - started

    def _capture(self, buffers: Buffers) -> None:
        self.graph = torch.cuda.CUDAGraph()
        # PyTorch's own stream for captures is on the GPU of the process's first capture, and other
        # threads of the process may use the GPU meanwhile.
        with torch.cuda.graph(
            self.graph, stream=buffers.own_stream, capture_error_mode="thread_local"
        ):
            self._execute(buffers)


def import_library(backend: str) -> None:
    """Import a flavour of TensorRT. Raises BundleError when it is missing or too old."""
    import_tensorrt(backend)


def refusal(record: EngineRecord, device: str, options: EngineOptions, rebuild: str) -> str:
    """Why this machine cannot execute the engine on a device; empty when it can.

    rebuild is the command that makes an engine for it.
    """
    return target_refusal(record, device, rebuild)


def open_engines(
    record: EngineRecord,
    files: Mapping[str, PinnedFile],
    weights: Callable[[], Mapping[str, PinnedFile]],
    options: EngineOptions,
    device: str,
) -> Mapping[str, Engine]:
    """The engine of each expert. weights gives the files by expert, where the plans take any.

    Raises BundleError when a plan cannot be opened or does not fit, BadRequest for other weights or
    offload where they were baked in, EngineFailure when the GPU is too small.
    """
    place = gpu_or_cpu(device)
    plans = _open_plans(record, files, place)
    if not record.program.is_plain:
        return open_moments(record, plans, weights(), options, place)
    experts = {role.removeprefix(WHOLE).removeprefix("-"): plan for role, plan in plans.items()}
    return _open_plain(record, experts, weights, options, place)


def _open_plain(
    record: EngineRecord,
    plans: Mapping[str, Plan],
    weights: Callable[[], Mapping[str, PinnedFile]],
    options: EngineOptions,
    place: torch.device,
) -> dict[str, TensorRtEngine]:
    """The engine of each expert, from plans by the expert whose weights are baked in; from one of
    the key "" that takes any."""
    is_baked = not any(plan.parameters(record.inputs) for plan in plans.values())
    if is_baked and (options.offload or options.weights is not None):
        raise BadRequest(_BAKED.format(f"engine {record.name}"))
    needed = EXPERTS if is_baked and record.sampling.boundary is not None else ("",)
    if missing := [expert for expert in needed if expert not in plans]:
        role = "-".join(filter(None, (WHOLE, missing[0])))
        raise BundleError(f"engine {record.name} has no {role}: run wanexport build again")
    chosen = {} if is_baked else weights()
    plans = plans if is_baked else {expert: plans[""] for expert in chosen}
    ends = {**record.inputs, OUTPUT: record.output}
    for expert, plan in plans.items():
        plan.check(ends, chosen.get(expert))
    size = max(plan.activation_bytes for plan in plans.values())
    buffers = Buffers(record.inputs, {OUTPUT: record.output}, size, place)
    held: DeviceWeights | None = None
    engines: dict[str, TensorRtEngine] = {}
    for expert, plan in plans.items():
        file = chosen.get(expert)
        if file is not None and not (held and options.offload):
            held = device_weights(file, place, private=options.offload is not None)
        engines[expert] = TensorRtEngine(plan, buffers, held, file, cuda_graph=options.cuda_graph)
    return engines


def _open_plans(
    record: EngineRecord, files: Mapping[str, PinnedFile], device: torch.device
) -> dict[str, Plan]:
    """The plans by their roles."""
    kernels = cache_folder() if FLAVOURS[record.backend].keeps_kernels else None
    return {
        role: Plan(
            record.backend,
            file,
            device,
            # Of this very plan: another's kernels would be code of unknown origin.
            kernels=kernels and kernels / f"{file.sha256}-{arch(device)}.kernels",
            version_compatible=record.details.version_compatible,
        )
        for role, file in files.items()
        if is_plan(role)
    }


def run_once(
    flavour: str,
    path: Path,
    weights: Path,
    *,
    inputs: Mapping[str, TensorSpec],
    output: TensorSpec,
    values: Mapping[str, Any],
    device: str = "cuda",
    version_compatible: bool = False,
) -> Any:
    """The velocity of a plan for these values, in numpy, leaving nothing on the GPU."""
    place = gpu_or_cpu(device)
    plan = Plan(flavour, path, place, version_compatible=version_compatible)
    file = pin(weights) if plan.parameters(inputs) else None
    plan.check({**inputs, OUTPUT: output}, file)
    buffers = Buffers(inputs, {OUTPUT: output}, plan.activation_bytes, place)
    held = device_weights(file, place) if file else None
    engine = TensorRtEngine(plan, buffers, held, file, cuda_graph=False)
    return engine({name: to_device(v, place) for name, v in values.items()}).cpu().numpy()


def plan_role(files: Mapping[str, Any], expert: str) -> str:
    """The role of the file that serves an expert: its own plan where weights were baked in."""
    own = f"{WHOLE}-{expert}"
    return own if own in files else WHOLE
