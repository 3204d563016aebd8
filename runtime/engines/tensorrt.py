"""A TensorRT engine, of either flavour: one plan, whose parameters are inputs that are bound once.

A call copies its inputs into fixed buffers and the velocity out of one, on the GPU: TensorRT wants
addresses aligned to 256 bytes, which a caller's view need not have, and a CUDA graph wants them to
stay. Nothing goes through the host, and the host does not wait.
"""

import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wanexport.runtime.bundle.manifest import EngineRecord, TensorSpec
from wanexport.runtime.bundle.pinned_file import PinnedFile, pin
from wanexport.runtime.engines.aoti import to_device
from wanexport.runtime.engines.cache_folder import cache_folder
from wanexport.runtime.engines.device_weights import DeviceWeights, check_room, device_weights
from wanexport.runtime.engines.tensorrt_plan import OUTPUT, Plan, on_gpu
from wanexport.runtime.engines.tensorrt_target import arch, is_version_compatible
from wanexport.runtime.errors import WanExportError

_LAUNCH_BOUND = 0.7  # of an execution's time: when its launch takes more, a CUDA graph pays
_LONG = 10.0  # seconds of the first execution, beyond which no launch is worth measuring


class Buffers:
    """Device memory that the experts of an engine use by turns: inputs, output, activations.

    A turn is in the caller's stream and starts when that before it has ended, in whatever stream.
    """

    def __init__(
        self, inputs: Mapping[str, TensorSpec], output: TensorSpec, size: int, device: torch.device
    ) -> None:
        advice = "build one of a smaller --resolution or fewer --frames"
        check_room(size, device, "the engine's activation memory", advice)
        self.device = device
        # Of a caller in inference mode, calls outside it could not write them.
        with on_gpu(device), torch.inference_mode(False):
            self.inputs = {
                name: torch.zeros(spec.shape, device=device) for name, spec in inputs.items()
            }
            self.output = torch.empty(output.shape, device=device)
            self.activations = torch.empty(max(1, size), dtype=torch.uint8, device=device)
        self.lock = threading.Lock()
        self.own_stream, self.idle = torch.cuda.Stream(device), torch.cuda.Event()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Have the buffers for what the caller's current stream is given meanwhile."""
        with self.lock, on_gpu(self.device):
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


class TensorRtEngine:
    """Executes a plan with one expert's weights; torch tensors on the device in and out.

    `file` is the weights file that `weights` must hold during a call: with --offload two engines
    share one buffer. Both are None where weights were baked in. The plan runs once here, which
    loads its kernels; cuda_graph None captures a graph when launching takes as long as running.
    Raises WanExportError when TensorRT refuses a tensor or fails.
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
        self.plan, self.buffers, self.weights, self.file = plan, buffers, weights, file
        self.graph: torch.cuda.CUDAGraph | None = None
        # Before the context and the memory bound to it go: an execution may still use them.
        weakref.finalize(self, buffers.idle.synchronize)
        tensors = {**(weights.tensors if weights else {}), **buffers.inputs, OUTPUT: buffers.output}
        with buffers.turn():
            self.context = plan.bind(tensors, buffers.activations)
            self.launch_seconds, self.seconds = self._warm_up()
            if cuda_graph is None:
                cuda_graph = self.launch_seconds > _LAUNCH_BOUND * self.seconds
            if cuda_graph:
                self._capture()
        plan.save_kernels()

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the velocity; the caller's current CUDA stream does the work, the host waits not.

        Raises WanExportError when TensorRT fails.
        """
        with self.buffers.turn():
            if self.weights is not None and self.file is not None:
                self.weights.use(self.file)
            for name, buffer in self.buffers.inputs.items():
                buffer.copy_(inputs[name])
            if self.graph is None:
                self._execute()
            else:
                self.graph.replay()
            return self.buffers.output.clone()

    @property
    def device_memory(self) -> dict[str, int]:
        """Bytes on the device: of the activations, which experts share, and of the weights."""
        weights = self.plan.weights_bytes
        if self.weights is not None:
            weights += self.weights.buffer.nbytes
        return {"activations": self.buffers.activations.nbytes, "weights": weights}

    def _execute(self) -> None:
        self.plan.log.clear()
        with self.buffers.stream() as handle:
            if not self.context.execute_async_v3(handle):
                raise self.plan.failure("execute")

    def _warm_up(self) -> tuple[float, float]:
        """Seconds to launch the plan and to run it, which the first execution would not tell: it
        loads kernels. One that is long is not repeated, and its launch counts nothing."""
        _, first = self._timed_execution()
        return (0.0, first) if first > _LONG else self._timed_execution()

    def _timed_execution(self) -> tuple[float, float]:
        torch.cuda.synchronize(self.buffers.device)
        started = time.perf_counter()
        self._execute()
        launched = time.perf_counter()
        torch.cuda.synchronize(self.buffers.device)
        return launched - started, time.perf_counter() - started

    def _capture(self) -> None:
        self.graph = torch.cuda.CUDAGraph()
        # PyTorch's own stream for captures is on the GPU of the process's first capture, and other
        # threads of the process may use the GPU meanwhile.
        with torch.cuda.graph(
            self.graph, stream=self.buffers.own_stream, capture_error_mode="thread_local"
        ):
            self._execute()


def open_engines(
    engine: EngineRecord,
    files: Mapping[str, PinnedFile],
    experts: Sequence[str],
    weights: Callable[[], Mapping[str, PinnedFile]],
    *,
    own_weights: bool = True,
    offload: bool = False,
    cuda_graph: bool | None = None,
) -> dict[str, TensorRtEngine]:
    """The engine of each expert. weights gives the files by expert, where the plans take any;
    own_weights is whether they are the bundle's.

    Raises WanExportError when a plan cannot be opened or does not fit, or the GPU is too small.
    """
    device = gpu()
    plans = _open_plans(engine, files, experts, device)
    is_baked = not any(plan.parameters(engine.inputs) for plan in plans.values())
    if is_baked and (offload or not own_weights):
        raise WanExportError(
            f"engine {engine.name} holds its weights inside and can neither offload nor change "
            f"them: build one without --bake-weights"
        )
    chosen = {} if is_baked else weights()
    for expert, plan in plans.items():
        plan.check(engine.inputs, engine.output, chosen.get(expert))
    size = max(plan.activation_bytes for plan in plans.values())
    buffers = Buffers(engine.inputs, engine.output, size, device)
    held: DeviceWeights | None = None
    engines: dict[str, TensorRtEngine] = {}
    for expert, plan in plans.items():
        file = chosen.get(expert)
        if file is not None and not (held and offload):
            held = device_weights(file, device, private=offload)
        engines[expert] = TensorRtEngine(plan, buffers, held, file, cuda_graph=cuda_graph)
    return engines


def _open_plans(
    engine: EngineRecord,
    files: Mapping[str, PinnedFile],
    experts: Sequence[str],
    device: torch.device,
) -> dict[str, Plan]:
    """The plan of each expert: one for all unless weights were baked in."""
    opened: dict[str, Plan] = {}
    kernels = cache_folder() if engine.backend == "tensorrt-rtx" else None
    for role in dict.fromkeys(plan_role(files, expert) for expert in experts):
        file = files[role]
        opened[role] = Plan(
            engine.backend,
            file,
            device,
            # Of this very plan: another's kernels would be code of unknown origin.
            kernels=kernels and kernels / f"{file.sha256}-{arch()}.kernels",
            version_compatible=is_version_compatible(engine),
        )
    return {expert: opened[plan_role(files, expert)] for expert in experts}


def run_once(
    flavour: str,
    path: Path,
    weights: Path,
    *,
    inputs: Mapping[str, TensorSpec],
    output: TensorSpec,
    values: Mapping[str, Any],
    version_compatible: bool = False,
) -> Any:
    """The velocity of a plan for these values, in numpy, leaving nothing on the GPU."""
    device = gpu()
    plan = Plan(flavour, path, device, version_compatible=version_compatible)
    file = pin(weights) if plan.parameters(inputs) else None
    plan.check(inputs, output, file)
    buffers = Buffers(inputs, output, plan.activation_bytes, device)
    held = device_weights(file, device) if file else None
    engine = TensorRtEngine(plan, buffers, held, file, cuda_graph=False)
    return engine({name: to_device(v, device) for name, v in values.items()}).cpu().numpy()


def plan_role(files: Mapping[str, Any], expert: str) -> str:
    """The role of the file that serves an expert: its own plan where weights were baked in."""
    own = f"denoiser-{expert}"
    return own if own in files else "denoiser"


def gpu() -> torch.device:
    """The current GPU."""
    return torch.device("cuda", torch.cuda.current_device())
