"""Which kernel attends to a causal model's cache: the fastest on this GPU that is right there.

How each takes the number of keys is a matter of PyTorch and cuDNN, whose versions differ, so a
kernel is held against plain maths before it is timed.
"""

import statistics
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from wanexport.graphs.graph import torch_dtype
from wanexport.runtime.engines.cached_kernels import CACHED, CachedKernel
from wanexport.runtime.engines.device_name import device_kind
from wanexport.runtime.errors import WanExportWarning
from wanexport.runtime.program import Attention
from wanexport.runtime.wan_config import WanConfig

CANDIDATES = ("cudnn_ragged", "flash_ragged", "mask")
TOLERANCE = 2e-2  # relative L2 to fp32: of bf16, whose own rounding is some 3e-3
_ROUNDS, _WARM_UPS = 5, 2
_LEAST = 200  # keys of the check, where the cache has as many


def choose_cached_kernel(
    config: WanConfig, shape: Attention, dtype: str, device: str
) -> tuple[str, dict[str, float]]:
    """The kernel of CACHED for a cache of these keys, and the median seconds with all of them.

    device is PyTorch's name of the one that is measured. A kernel that does not run, or is wrong,
    is left out with a warning.
    """
    if device_kind(device) == "cpu":
        return "prefix", {}
    if dtype == "fp32":  # which the others do not take
        return "mask", {}
    times = {}
    with torch.cuda.device(device):
        for name in CANDIDATES:
            try:
                if (error := error_of(CACHED[name], config, shape, dtype)) < TOLERANCE:
                    q, k, v = _drawn(config, shape.queries, shape.keys, dtype)
                    times[name] = median_seconds(CACHED[name], q, k, v, _count(shape.keys))
                else:
                    _warn(name, f"its result is {error:.1e} from plain maths")
            except RuntimeError as error:
                _warn(name, " ".join(str(error).split())[:160])
    return min(times, key=lambda name: times[name], default="mask"), times


def error_of(kernel: CachedKernel, config: WanConfig, shape: Attention, dtype: str) -> float:
    """Relative L2 of a kernel's result with half of the keys, the others being huge, to fp32."""
    q, k, v = _drawn(config, min(shape.queries, _LEAST), shape.keys, dtype)
    count = max(1, min(_LEAST, shape.keys // 2))
    k[:, count:], v[:, count:] = 100, 1000
    found = kernel(q, k, v, _count(count)).float()
    q, k, v = (x.float().transpose(1, 2) for x in (q, k[:, :count], v[:, :count]))
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return float((found - expected).norm() / expected.norm())


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


def _count(keys: int) -> Tensor:
    return torch.tensor([keys], device="cuda")


def _warn(name: str, reason: str) -> None:
    warnings.warn(
        f"attention of kind cache is chosen without {name}: {reason}",
        WanExportWarning,
        stacklevel=3,
    )
