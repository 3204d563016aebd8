"""Kernels of attention to the first keys of a cache, whose number lies on the device.

Each takes q [1, S, H, D], k and v [1, T, H, D], and keys [1] int64. None has the host wait for a
GPU, and none copies the cache. A kernel of plain attention serves where the caller knows the number
too: it is given a view of the cache. Otherwise one of `CACHED` reads the number on the device.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

CachedKernel = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# An operator has no other way to learn what its caller knows.
_count: ContextVar[int | None] = ContextVar("keys that are attended to", default=None)
_HALF = (torch.float16, torch.bfloat16)


@contextmanager
def attending_to(count: int | None) -> Iterator[None]:
    """Say how many keys of a cache count, within the block and its thread; None is not known."""
    token = _count.set(count)
    try:
        yield
    finally:
        _count.reset(token)


def to_prefix(kernel: Callable[[Tensor, Tensor, Tensor], Tensor]) -> CachedKernel:
    """A kernel of plain attention, on a view of the keys that count."""

    def run(q: Tensor, k: Tensor, v: Tensor, keys: Tensor) -> Tensor:
        count = _count.get()
        if count is None and keys.is_cuda:
            return on_device(q, k, v, keys)
        count = int(keys) if count is None else count
        # Strides of a tensor by itself: kernels compare that of the batch too.
        return kernel(q, k[0, :count][None], v[0, :count][None])

    return run


def on_device(q: Tensor, k: Tensor, v: Tensor, keys: Tensor) -> Tensor:
    """What runs on a GPU where nobody knows the number."""
    return (flash_ragged if q.dtype in _HALF else mask)(q, k, v, keys)


def mask(q: Tensor, k: Tensor, v: Tensor, keys: Tensor) -> Tensor:
    """Attention to all keys, where the others have a bias of minus infinity; takes as long as to
    a full cache. The rest of v must be finite."""
    others = torch.arange(k.shape[1], device=k.device) >= keys
    bias = torch.zeros(k.shape[1], dtype=q.dtype, device=q.device)
    bias = bias.masked_fill_(others, float("-inf"))[None, None, None]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).contiguous()


def cudnn_ragged(q: Tensor, k: Tensor, v: Tensor, keys: Tensor) -> Tensor:
    """cuDNN's kernel for sequences of several lengths, of which there is one.

    PyTorch up to 2.14 plans it anew at every call, which takes the host longer than the GPU.
    """
    out = torch.ops.aten._cudnn_attention_forward(
        q[0], k[0], v[0], None, _starts(q.shape[1], keys), _ends(keys), q.shape[1], k.shape[1],
        False, 0.0, False, False,
    )[0]  # fmt: skip
    return out.view(q.shape)


def flash_ragged(q: Tensor, k: Tensor, v: Tensor, keys: Tensor) -> Tensor:
    """FlashAttention-2 of PyTorch for sequences of several lengths, of which there is one."""
    out = torch.ops.aten._flash_attention_forward(
        q[0], k[0], v[0], _starts(q.shape[1], keys), _ends(keys), q.shape[1], k.shape[1],
        0.0, False, False,
    )[0]  # fmt: skip
    return out.view(q.shape)


def _starts(length: int, keys: Tensor) -> Tensor:
    """0 and the number of queries, int32 on the device."""
    return torch.arange(0, length + 1, length, dtype=torch.int32, device=keys.device)


def _ends(keys: Tensor) -> Tensor:
    """0 and the number of keys, int32 on the device."""
    return F.pad(keys.to(torch.int32), (1, 0))


CACHED: Mapping[str, CachedKernel] = {
    "flash_ragged": flash_ragged, "cudnn_ragged": cudnn_ragged, "mask": mask,
}  # fmt: skip
