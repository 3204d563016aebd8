"""Which attention kernel an engine uses: the fastest at its shapes on this GPU, by measurement."""

import warnings
from pathlib import Path

import torch

from wanexport.exporter.backends.aoti.cached_attention import choose_cached_kernel, median_seconds
from wanexport.graphs.graph import torch_dtype
from wanexport.runtime.bundle.signature import program_of
from wanexport.runtime.engines.device_name import device_kind
from wanexport.runtime.engines.kernels import kernel_obstacle
from wanexport.runtime.engines.operators import Kernel, open_kernel
from wanexport.runtime.errors import EngineFailure, WanExportWarning
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.program import Attention
from wanexport.runtime.wan_config import WanConfig

_CANDIDATES = ("cudnn", "sdpa", "fa4")
_MARGIN = 0.95  # of cuDNN's time: what must be beaten, so that noise does not choose

Seconds = dict[str, dict[str, float]]


def choose_kernels(
    config: WanConfig,
    geometry: Geometry,
    dtype: str,
    device: str,
    flash_library: Path | None,
    wanted: str | None = None,
) -> tuple[dict[str, str], Seconds]:
    """The kernel for each kind of attention, and the median seconds of every one that was tried.

    device is PyTorch's name of the one that is measured. wanted is the kernel of self-attention, or
    to a cache, if it is not to be the fastest. A kernel that cannot be measured is left out with a
    warning. Raises EngineFailure when none is left.
    """
    names = _names(dtype, device, flash_library is not None)
    chosen: dict[str, str] = {}
    seconds: Seconds = {}
    for kind, shape in program_of(config, geometry).attention.items():
        if kind == "cache":
            plain = [wanted] if wanted else names
            kernels = {name: open_kernel(name, flash_library, kind) for name in plain}
            chosen[kind], times = choose_cached_kernel(config, shape, dtype, device, kernels)
            seconds |= {kind: times} if times else {}
            continue
        own = [wanted] if wanted and kind == "self" else names
        if own == ["sdpa"]:  # which runs wherever PyTorch does
            chosen[kind] = own[0]
            continue
        times = {}
        for name in own:
            kernel = open_kernel(name, flash_library)
            try:
                times[name] = _time(config, shape, dtype, device, kernel)
            except RuntimeError as error:  # a kernel that refuses the shape, or no memory for it
                _warn(name, kind, error)
        chosen[kind], seconds[kind] = _best(times), times
    if device != "cpu":
        torch.cuda.empty_cache()  # the proof's process needs the room
    return chosen, seconds


def _names(dtype: str, device: str, has_flash: bool) -> list[str]:
    """The kernels that can be measured on a device."""
    kind = device_kind(device)
    target = {"device": kind, "arch": "" if kind == "cpu" else _arch(device)}
    names = [name for name in _CANDIDATES if not kernel_obstacle(name, target, dtype)]
    return names if has_flash else [name for name in names if name != "fa4"]


def _arch(device: str) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def _warn(name: str, kind: str, error: RuntimeError) -> None:
    reason = " ".join(str(error).split())[:160]
    warnings.warn(
        f"attention of kind {kind} is chosen without {name}, which did not run ({reason}): "
        f"if another program took the GPU's memory, close it and build into a new folder",
        WanExportWarning,
        stacklevel=3,
    )


def _best(seconds: dict[str, float]) -> str:
    """cuDNN's unless another is clearly faster."""
    if not seconds:
        raise EngineFailure(
            "no attention kernel runs at this shape: build a smaller --resolution or fewer --frames"
        )
    fastest = min(seconds, key=lambda name: seconds[name])
    default = seconds.get("cudnn", float("inf"))
    return fastest if seconds[fastest] < _MARGIN * default else "cudnn"


def _time(config: WanConfig, shape: Attention, dtype: str, device: str, kernel: Kernel) -> float:
    """Median seconds of one call. Raises RuntimeError as the kernel does."""

    def random(length: int) -> torch.Tensor:
        heads = (1, length, config.num_heads, config.head_dim)
        return torch.randn(heads, device=device, dtype=torch_dtype(dtype))

    with torch.cuda.device(device):
        return median_seconds(kernel, random(shape.queries), *(random(shape.keys) for _ in "kv"))
