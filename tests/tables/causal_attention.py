"""Print the table of attention to a causal model's cache: time of each kernel against the keys.

    python -m tests.tables.causal_attention [HEADS [FLASH_LIBRARY]]

One GPU, bf16, a chunk of 3 latent frames at 480x832 (4680 queries) and a cache of 21 with one slot
more. Medians of 7 calls; the product of two 8192 x 8192 matrices in the same run is the yardstick.
The error is relative L2 to fp32, with what lies behind the keys set to 1000: 3e-3 is bf16's own.
Kernels of plain attention are told the number by the host and given a view of the cache; the others
read it on the device. FLASH_LIBRARY is a bundle's `flash_attention-bf16-128.so`; `fa4 whole` never
divides the keys of a call's last queries.
"""

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from wanexport.runtime.engines.cached_kernels import CACHED, CachedKernel, attending_to
from wanexport.runtime.engines.flash_attention import Division
from wanexport.runtime.engines.operators import open_kernel

FRAME, CHUNK, CACHE, HEAD_DIM = 1560, 3, 21, 128
ROUNDS, WARM_UPS = 7, 3
FRAMES = (3, 6, 9, 12, 15, 18, 21)


def seconds(run: Callable[[], object]) -> float:
    """The GPU's time of one call."""
    times = []
    for _ in range(ROUNDS + WARM_UPS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[WARM_UPS:])


def with_sums(q: Tensor, k: Tensor, v: Tensor, keys: Tensor) -> Tensor:
    """`cudnn_ragged` that also gives the sums of exponentials, as PyTorch's own caller asks."""
    starts = torch.arange(0, q.shape[1] + 1, q.shape[1], dtype=torch.int32, device="cuda")
    ends = F.pad(keys.to(torch.int32), (1, 0))
    lengths = q.shape[1], k.shape[1]
    out: Tensor = torch.ops.aten._cudnn_attention_forward(
        q[0], k[0], v[0], None, starts, ends, *lengths, True, 0.0, False, False
    )[0]
    return out.view(q.shape)


def error(kernel: CachedKernel, q: Tensor, k: Tensor, v: Tensor, count: int) -> float:
    """Relative L2 of the first 300 queries to fp32."""
    q = q[:, :300].contiguous()
    k, v = k.clone(), v.clone()
    k[:, count:], v[:, count:] = 100, 1000
    with attending_to(count):
        found = kernel(q, k, v, torch.tensor([count], device="cuda")).float()
    q, k, v = (x.float().transpose(1, 2) for x in (q, k[:, :count], v[:, :count]))
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return float((found - expected).norm() / expected.norm())


def undivided(kernel: CachedKernel) -> CachedKernel:
    """FlashAttention-4 on all keys at once, whatever processors that leaves idle."""

    def run(q: Tensor, *rest: Tensor) -> Tensor:
        path = "wanexport.runtime.engines.flash_attention._division_of"
        with patch(path, lambda q, _: Division(q.shape[1], 1)):
            return kernel(q, *rest)

    return run


def row(name: str, kernel: CachedKernel, tensors: list[Tensor], rate: float) -> None:
    """Milliseconds for each number of frames, and what share of the product's rate the last has."""
    q, k, v = tensors
    cells = []
    try:
        worst = max(error(kernel, q, k, v, n) for n in (FRAME * CHUNK, FRAME * 7, 5 * FRAME + 24))
        for frames in FRAMES:
            keys = torch.tensor([frames * FRAME], device="cuda")
            with attending_to(frames * FRAME):
                cells.append(seconds(lambda: kernel(q, k, v, keys)))  # noqa: B023
    except RuntimeError as failure:
        print(f"{name:14} does not run: {' '.join(str(failure).split())[:110]}")
        return
    flops = 4 * q.shape[1] * FRAMES[-1] * FRAME * q.shape[2] * HEAD_DIM
    share = flops / cells[-1] / rate
    shown = " ".join(f"{1e3 * cell:7.3f}" for cell in cells)
    print(f"{name:14} {shown}   {flops / cells[-1] / 1e12:6.0f} TF/s {share:5.2f}   {worst:.1e}")


def waits(name: str, kernel: CachedKernel, tensors: list[Tensor]) -> str:
    """Whether a call has the host wait for the GPU."""
    keys = torch.tensor([FRAME * CHUNK], device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with attending_to(FRAME * CHUNK):
            kernel(tensors[0], tensors[1], tensors[2], keys)
    except RuntimeError as failure:
        return f"{name}: {' '.join(str(failure).split())[:60]}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return f"{name}: none"


def main(heads: int, library: Path | None) -> None:
    """Print the rows of every kernel, and which of them wait."""
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, "
          f"cuDNN {torch.backends.cudnn.version()}, {heads} heads")  # fmt: skip
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    rate = 2 * 8192**3 / seconds(lambda: a @ a)
    print(f"product of 8192 x 8192: {rate / 1e12:.0f} TF/s; milliseconds by frames of keys:")
    print(f"{'':14} {' '.join(f'{frames:7}' for frames in FRAMES)}   with all, share    error")
    lengths = (CHUNK * FRAME, (CACHE + 1) * FRAME, (CACHE + 1) * FRAME)
    tensors = [
        torch.randn((1, n, heads, HEAD_DIM), device="cuda", dtype=torch.bfloat16) for n in lengths
    ]
    names = ("cudnn", "sdpa", *(["fa4"] if library else []))
    kernels = {name: open_kernel(name, library, "cache") for name in names}
    kernels |= {"fa4 whole": undivided(kernels["fa4"])} if library else {}
    kernels |= {**CACHED, "with sums": with_sums}
    for name, kernel in kernels.items():
        row(name, kernel, tensors, rate)
    print(
        "host waits:", "; ".join(waits(name, kernel, tensors) for name, kernel in kernels.items())
    )


if __name__ == "__main__":
    heads, library = (*sys.argv[1:], None, None)[:2]
    main(int(heads or 12), Path(library) if library else None)
