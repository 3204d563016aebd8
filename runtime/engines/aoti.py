"""An AOTInductor engine: embedding, one compiled block called for every layer, and head.

Nothing here compiles anything or imports Inductor: the packages are opened by libtorch's own
loader, and attention runs kernels that are in the bundle or in PyTorch.
"""

import platform
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wanexport.runtime.bundle.pinned_file import PinnedFile, pin
from wanexport.runtime.bundle.signature import BLOCK, REGIONS
from wanexport.runtime.engines.device_weights import DeviceWeights
from wanexport.runtime.engines.operators import Kernel, attention_kernels
from wanexport.runtime.engines.processor import level_for, level_here, runs_here
from wanexport.runtime.errors import WanExportError
from wanexport.runtime.machine.temporary import check_temporary_folder

# What compiled code depends on, of what `versions` says.
BINDING = ("device", "arch", "march", "instructions", "torch", "cuda")
_LAUNCH_BOUND = 0.7  # of a block's GPU time: when its launch takes more, a CUDA graph pays
_WARM_UPS, _TIMED = 2, 5  # block calls


class Regions:
    """The opened packages of one engine: code, without weights.

    `parameters` names each region's parameters in the order of its inputs, the block's as the first
    block's. Raises WanExportError when a package cannot be opened, or is not what was pinned.
    """

    def __init__(
        self,
        files: Mapping[str, Path | PinnedFile],
        parameters: Mapping[str, Sequence[str]],
        num_layers: int,
        kernels: Mapping[int, Kernel],
        device: torch.device,
    ) -> None:
        self.num_layers, self.kernels, self.device = num_layers, kernels, device
        self.parameters = parameters
        check_temporary_folder(runs_code=True)
        self.runners = {name: _open(files[name], device) for name in REGIONS}
        self.lock = threading.Lock()  # a runner serves one caller at a time

    def bind(self, tensors: Mapping[str, Tensor]) -> "BoundRegions":
        """The regions with the weights of one expert.

        Raises WanExportError when a parameter is not among them.
        """
        suffixes = [name.removeprefix(BLOCK.format(0)) for name in self.parameters["block"]]
        try:
            blocks = [
                [tensors[BLOCK.format(i) + suffix] for suffix in suffixes]
                for i in range(self.num_layers)
            ]
            embed, head = ([tensors[n] for n in self.parameters[r]] for r in ("embed", "head"))
        except KeyError as error:
            raise WanExportError(
                f"the engine takes a parameter {error} that its weights lack: "
                f"run wanexport build again"
            ) from error
        return BoundRegions(self, embed, blocks, head)


class BoundRegions:
    """The forward of one expert; every tensor is on the device."""

    def __init__(
        self, regions: Regions, embed: list[Tensor], blocks: list[list[Tensor]], head: list[Tensor]
    ) -> None:
        self.regions, self.embed, self.blocks, self.head = regions, embed, blocks, head

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """The velocity, from the graph's inputs in its order."""
        run = self.regions.runners
        with attention_kernels(self.regions.kernels), torch.no_grad():
            x, time_embedding, *conditioning = run["embed"].run([*self.embed, *inputs])
            for parameters in self.blocks:
                (x,) = run["block"].run([*parameters, x, *conditioning])
            (velocity,) = run["head"].run([*self.head, x, time_embedding])
        return velocity

    def warm_up(self, inputs: Sequence[Tensor]) -> tuple[float, float]:
        """Run every kernel once or more, and return a block's launch and GPU time in seconds.

        The first call of a kernel loads it and sets libraries up, which would fall on a first step.
        On a CPU there is nothing to set up, and what it would take is as long as a step.
        """
        if self.regions.device.type != "cuda":
            return 0.0, 0.0
        run, parameters = self.regions.runners, self.blocks[0]
        with attention_kernels(self.regions.kernels), torch.no_grad():
            x, time_embedding, *conditioning = run["embed"].run([*self.embed, *inputs])
            for _ in range(_WARM_UPS):
                (x,) = run["block"].run([*parameters, x, *conditioning])
            run["head"].run([*self.head, x, time_embedding])
            torch.cuda.synchronize(self.regions.device)
            started = time.perf_counter()
            for _ in range(_TIMED):
                (x,) = run["block"].run([*parameters, x, *conditioning])
            launched = time.perf_counter()
            torch.cuda.synchronize(self.regions.device)
        return (launched - started) / _TIMED, (time.perf_counter() - started) / _TIMED


class AotiEngine:
    """Calls the regions with one expert's weights; torch tensors on the device in and out.

    `file` is the weights file that `weights` must hold during a call: with --offload two engines
    share one buffer. cuda_graph None captures a graph when launching takes as long as running.
    """

    def __init__(
        self,
        regions: Regions,
        weights: DeviceWeights,
        file: Path | PinnedFile,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        cuda_graph: bool | None = None,
    ) -> None:
        self.regions, self.weights, self.file = regions, weights, file
        self.names = tuple(shapes)
        self.device = regions.device
        self.bound = regions.bind(weights.tensors)
        self.graph: torch.cuda.CUDAGraph | None = None
        # Of a caller in inference mode, calls outside it could not write them.
        with torch.inference_mode(False):
            zeros = [torch.zeros(shape, device=self.device) for shape in shapes.values()]
        with _on(self.device):
            self.launch_seconds, self.block_seconds = self.bound.warm_up(zeros)
            if cuda_graph is None:
                cuda_graph = self.launch_seconds > _LAUNCH_BOUND * self.block_seconds > 0
            if cuda_graph and self.device.type == "cuda":
                self._capture(zeros)

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the velocity; the caller's current CUDA stream does the work, the host waits not.

        Raises WanExportError when the device has too little memory.
        """
        given = [inputs[name] for name in self.names]
        with self.regions.lock, _on(self.device):
            self.weights.use(self.file)
            if self.graph is None:
                return self.bound(given)
            return self._replay(self.graph, given)

    def _replay(self, graph: torch.cuda.CUDAGraph, given: Sequence[Tensor]) -> Tensor:
        """The graph's one set of buffers serves callers on several streams, one after the other."""
        caller = torch.cuda.current_stream(self.device)
        caller.wait_event(self._idle)
        try:
            for static, tensor in zip(self._inputs, given):
                static.copy_(tensor)
            graph.replay()
            return self._output.clone()
        finally:  # what was launched before a failure uses them too
            self._idle.record(caller)

    def _capture(self, inputs: list[Tensor]) -> None:
        self._inputs, self._idle = inputs, torch.cuda.Event()
        self.graph = torch.cuda.CUDAGraph()
        # PyTorch's own stream for captures is on the GPU of the process's first capture, and other
        # threads of the process may use the GPU meanwhile.
        with torch.cuda.graph(
            self.graph,
            stream=torch.cuda.Stream(self.device),
            capture_error_mode="thread_local",
        ):
            self._output = self.bound(inputs)


def to_device(value: Any, device: torch.device) -> Tensor:
    """An fp32 tensor on the device, contiguous; the host does not wait for the copy."""
    tensor = value if isinstance(value, Tensor) else torch.from_numpy(value)
    return tensor.detach().to(device, torch.float32, non_blocking=True).contiguous()


@contextmanager
def _on(device: torch.device) -> Iterator[None]:
    """Run on a device; what libtorch raises there becomes one line."""
    try:
        if device.type == "cuda":
            with torch.cuda.device(device):
                yield
        else:
            yield
    except RuntimeError as error:  # a package does not say of what kind
        reason = " ".join(str(error).split())[:160]
        raise WanExportError(
            f"the engine failed on {device} ({reason}), for want of memory most likely: close what "
            f"else uses it, or build an engine of a smaller --resolution or fewer --frames"
        ) from error


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
            raise WanExportError(f"libtorch cannot open {file.path}: {reason}") from error


def versions(device: str) -> dict[str, str]:
    """What an engine compiled here is bound to; the manifest records it and `load` compares.

    Raises WanExportError when the device is not there.
    """
    if device == "cpu":
        return {
            "device": "cpu",
            "arch": platform.machine(),
            "march": level_for(device),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "torch": torch.__version__,
        }
    if not torch.cuda.is_available():
        raise WanExportError("there is no CUDA device here; choose --device cpu")
    major, minor = torch.cuda.get_device_capability()
    return {
        "device": "cuda",
        "arch": f"sm{major}{minor}",
        "march": level_for(device),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "gpu": torch.cuda.get_device_name(),
    }


def mismatches(target: Mapping[str, str]) -> list[str]:
    """What of an engine's target is not so here, as `torch 2.11.0, here 2.13.0`.

    Raises WanExportError when its device is not there.
    """
    here = versions(target["device"])
    # A package runs on any processor that has the instructions it was compiled for.
    here["march"] = target["march"] if runs_here(target.get("march", "?")) else level_here()
    differing = [name for name in BINDING if here.get(name) != target.get(name)]
    return [f"{name} {target.get(name)}, here {here.get(name)}" for name in differing]
