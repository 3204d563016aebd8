"""Kernels of attention to the first keys of a cache, whose number lies on the device.

Each takes q [1, S, H, D], k and v [1, T, H, D], and keys [1] int64. None has the host wait for the
number, and none copies the cache.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

CachedKernel = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def prefix(q: Tensor, k: Tensor, v: Tensor, keys: Tensor) -> Tensor:
    """Attention to a view of the first keys. The host reads their number: for a CPU."""
    length = int(keys)
    q, k, v = (x.transpose(1, 2) for x in (q, k[:, :length], v[:, :length]))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()


def mask(q: Tensor, k: Tensor, v: Tensor, keys: Tensor) -> Tensor:
    """Attention to all keys, where the others have a bias of minus infinity; takes as long as to
    a full cache. The rest of v must be finite."""
    others = torch.arange(k.shape[1], device=k.device) >= keys
    bias = torch.zeros(k.shape[1], dtype=q.dtype, device=q.device)
    bias = bias.masked_fill_(others, float("-inf"))[None, None, None]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).contiguous()


def cudnn_ragged(q: Tensor, k: Tensor, v: Tensor, keys: Tensor) -> Tensor:
    """cuDNN's kernel for sequences of several lengths, of which there is one."""
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


def cached_attention_anywhere(q: Tensor, k: Tensor, v: Tensor, keys: Tensor) -> Tensor:
    """What runs where no kernel was chosen."""
    return (mask if q.is_cuda else prefix)(q, k, v, keys)


# `sdpa` is what PyTorch chooses: the whole prefix on a CPU, the mask on a GPU.
CACHED: Mapping[str, CachedKernel] = {
    "cudnn_ragged": cudnn_ragged,
    "flash_ragged": flash_ragged,
    "mask": mask,
    "prefix": prefix,
}
