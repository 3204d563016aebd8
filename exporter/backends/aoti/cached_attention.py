"""Which kernel attends to a causal model's cache: the fastest on this GPU that is right there.

How each takes the number of keys is a matter of PyTorch and cuDNN, whose versions differ, so a
kernel is held against plain maths before it is timed.
"""

import statistics
import warnings
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from wanexport.graphs.graph import torch_dtype
from wanexport.runtime.engines.cached_kernels import CACHED, CachedKernel, attending_to
from wanexport.runtime.errors import EngineFailure, WanExportWarning
from wanexport.runtime.program import Attention
from wanexport.runtime.wan_config import WanConfig

TOLERANCE = 2e-2  # relative L2 to fp32: of bf16, whose own rounding is some 3e-3
_ROUNDS, _WARM_UPS = 5, 2
_LEAST = 200  # keys of the check, where the cache has as many


def choose_cached_kernel(
    config: WanConfig,
    shape: Attention,
    dtype: str,
    device: str,
    plain: Mapping[str, CachedKernel],
) -> tuple[str, dict[str, float]]:
    """The kernel for a cache of these keys by name, and the median seconds with all of them.

    plain are those of plain attention, which run on a view of the cache. device is PyTorch's name
    of the one that is measured; where there is but one kernel, nothing is. One that does not run,
    or is wrong, is left out with a warning. Raises EngineFailure when none is left.
    """
    if [*plain] == ["sdpa"]:  # which runs wherever PyTorch does
        return "sdpa", {}
    candidates = {**plain, **CACHED} if len(plain) > 1 else plain
    times = {}
    with torch.cuda.device(device):
        for name, kernel in candidates.items():
            try:
                error = error_of(kernel, config, shape, dtype)
                if error < TOLERANCE:
                    times[name] = seconds_of(kernel, config, shape, dtype)
                else:
                    _warn(name, f"its result is {error:.1e} from plain maths")
            except RuntimeError as failure:
                _warn(name, " ".join(str(failure).split())[:160])
    if not times:
        raise EngineFailure(
            "no kernel of attention to a cache runs at this shape: build a smaller --resolution, "
            "--chunk or --cache"
        )
    return min(times, key=lambda name: times[name]), times


def seconds_of(kernel: CachedKernel, config: WanConfig, shape: Attention, dtype: str) -> float:
    """Median seconds with a full cache, of which the caller knows."""
    given = _drawn(config, shape.queries, shape.keys, dtype)
    with attending_to(shape.keys):
        return median_seconds(kernel, *given, _number(shape.keys))


def error_of(kernel: CachedKernel, config: WanConfig, shape: Attention, dtype: str) -> float:
    """Relative L2 to fp32 of a kernel's result with few of the keys, the others being huge.

    It is the worse of two calls: the caller knows their number, and does not.
    """
    q, k, v = _drawn(config, min(shape.queries, _LEAST), shape.keys, dtype)
    count = max(1, min(_LEAST, shape.keys // 2))
    k[:, count:], v[:, count:] = 100, 1000
    found = []
    for known in (count, None):
        with attending_to(known):
            found.append(kernel(q, k, v, _number(count)).float())
    q, k, v = (x.float().transpose(1, 2) for x in (q, k[:, :count], v[:, :count]))
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return max(float((own - expected).norm() / expected.norm()) for own in found)


def median_seconds(run: Callable[..., Tensor], *given: Tensor) -> float:
    """The GPU's seconds of one call. Raises RuntimeError as the call does."""
    times = []
    for _ in range(_WARM_UPS + _ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run(*given)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[_WARM_UPS:])


def _drawn(config: WanConfig, queries: int, keys: int, dtype: str) -> list[Tensor]:
    sizes = (queries, keys, keys)
    heads = (config.num_heads, config.head_dim)
    return [torch.randn((1, n, *heads), device="cuda", dtype=torch_dtype(dtype)) for n in sizes]


def _number(keys: int) -> Tensor:
    return torch.tensor([keys], device="cuda")


def _warn(name: str, reason: str) -> None:
    warnings.warn(
        f"attention of kind cache is chosen without {name}: {reason}",
        WanExportWarning,
        stacklevel=3,
    )
