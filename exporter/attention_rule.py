"""Which attention kernel an engine uses: the fastest at its shapes on this GPU, by measurement."""

import statistics
from pathlib import Path

import torch

from wanexport.graphs.weights import DTYPES
from wanexport.runtime.errors import WanExportError
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.operators import Kernel, open_kernel
from wanexport.runtime.signature import key_lengths
from wanexport.runtime.wan_config import WanConfig

_ROUNDS, _WARM_UPS = 5, 2
_MARGIN = 0.95  # of cuDNN's time: what must be beaten, so that noise does not choose

Seconds = dict[str, dict[str, float]]


def choose_kernels(
    config: WanConfig, geometry: Geometry, dtype: str, device: str, flash_library: Path | None
) -> tuple[dict[str, str], Seconds]:
    """The kernel for each number of keys, and the median seconds of every one that was tried."""
    lengths = key_lengths(config, geometry)
    if device == "cpu" or dtype == "fp32":
        return {str(length): "sdpa" for length in lengths}, {}
    names = ["cudnn", "sdpa"] + (["fa4"] if flash_library else [])
    chosen: dict[str, str] = {}
    seconds: Seconds = {}
    for length in lengths:
        times = {}
        for name in names:
            kernel = open_kernel(name, flash_library)
            taken = _time(config, geometry.num_tokens, length, dtype, kernel)
            if taken is not None:
                times[name] = taken
        chosen[str(length)], seconds[str(length)] = _best(times), times
    return chosen, seconds


def _best(seconds: dict[str, float]) -> str:
    """cuDNN's unless another is clearly faster."""
    if not seconds:
        raise WanExportError(
            "no attention kernel runs at this shape: build a smaller --resolution or fewer --frames"
        )
    fastest = min(seconds, key=lambda name: seconds[name])
    default = seconds.get("cudnn", float("inf"))
    return fastest if seconds[fastest] < _MARGIN * default else "cudnn"


def _time(config: WanConfig, queries: int, keys: int, dtype: str, kernel: Kernel) -> float | None:
    """Median seconds of one call; None for a kernel that refuses the shape."""

    def random(length: int) -> torch.Tensor:
        shape = (1, length, config.num_heads, config.head_dim)
        return torch.randn(shape, device="cuda", dtype=DTYPES[dtype])

    q, k, v = random(queries), random(keys), random(keys)
    times = []
    try:
        for _ in range(_WARM_UPS + _ROUNDS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            kernel(q, k, v)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
    except RuntimeError:
        return None
    return statistics.median(times[_WARM_UPS:])
