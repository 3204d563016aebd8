"""Rotary embedding as Triton kernels: into new tensors, and in place.

Importing this file needs Triton. A program holds one row of all heads in registers, so that it may
write where it read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _turned(x, cos, sin, BLOCK: tl.constexpr):
    even, odd = tl.split(tl.reshape(x.to(tl.float32), [BLOCK // 2, 2]))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), [BLOCK])


@triton.jit
def _one_kernel(
    x_ptr, out_ptr, cos_ptr, sin_ptr, DIM: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    pair = token * PAIRS + tl.arange(0, BLOCK // 2) % PAIRS
    cos, sin = tl.load(cos_ptr + pair), tl.load(sin_ptr + pair)
    x = tl.load(x_ptr + token * DIM + columns, mask=columns < DIM, other=0.0)
    y = _turned(x, cos, sin, BLOCK).to(x.dtype)
    tl.store(out_ptr + token * DIM + columns, y, mask=columns < DIM)


@triton.jit
def _both_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, DIM: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    pair = token * PAIRS + tl.arange(0, BLOCK // 2) % PAIRS
    cos, sin = tl.load(cos_ptr + pair), tl.load(sin_ptr + pair)
    q = tl.load(q_ptr + token * DIM + columns, mask=columns < DIM, other=0.0)
    k = tl.load(k_ptr + token * DIM + columns, mask=columns < DIM, other=0.0)
    q = _turned(q, cos, sin, BLOCK).to(q.dtype)
    k = _turned(k, cos, sin, BLOCK).to(k.dtype)
    tl.store(q_ptr + token * DIM + columns, q, mask=columns < DIM)
    tl.store(k_ptr + token * DIM + columns, k, mask=columns < DIM)


def _sizes(x: Tensor, table: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """The grid, and the constants of a kernel, for contiguous x [B, S, H, D]."""
    dim = x.shape[2] * x.shape[3]
    block = triton.next_power_of_2(dim)
    warps = 4 if block <= 2048 else 8
    constants = {"DIM": dim, "PAIRS": table.shape[-1], "BLOCK": block, "num_warps": warps}
    return (x.shape[0] * x.shape[1],), constants


def rotate_new(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [1, S, H, D] turned by half tables [1, S, 1, D / 2] fp32, in a new tensor."""
    out = torch.empty_like(x)
    grid, constants = _sizes(x, cos)
    _one_kernel[grid](x, out, cos, sin, **constants)
    return out


def rotate_in_place(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Query and key turned where they are, in one launch."""
    grid, constants = _sizes(q, cos)
    _both_kernel[grid](q, k, cos, sin, **constants)
    return q, k
