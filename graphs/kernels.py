"""The element-wise work of a block as Triton kernels, compiled ahead of time into the engine.

Each is an operator that Inductor takes as it is; the arithmetic and its roundings are those of
`graphs/wan.py`. Written where Inductor's own kernel took over twice the time that its bytes need.
One program handles one token, whose row it holds in registers: every operand is read once.

Importing this file needs Triton.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def _warps(block: int) -> int:
    """Enough threads that each holds 16 to 32 elements of the row."""
    return 4 if block <= 2048 else 8


@triton.jit
def _norm_kernel(
    x_ptr, y_ptr, gate_ptr, scale_ptr, shift_ptr, sum_ptr, out_ptr,
    tokens_per_row, gate_stride, scale_stride, eps,
    DIM: tl.constexpr, BLOCK: tl.constexpr,
    GATE_AT: tl.constexpr, SCALE_AT: tl.constexpr, SHIFT_AT: tl.constexpr,
    RESIDUAL: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr, ADD_ONE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    row = token // tokens_per_row
    columns = tl.arange(0, BLOCK)
    inside = columns < DIM
    x = tl.load(x_ptr + token * DIM + columns, mask=inside, other=0.0)
    if RESIDUAL:
        y = tl.load(y_ptr + token * DIM + columns, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            gate_row = gate_ptr + row * gate_stride + GATE_AT * DIM
            y *= tl.load(gate_row + columns, mask=inside, other=0.0)
        x += y
        tl.store(sum_ptr + token * DIM + columns, x, mask=inside)
    if NORM:
        mean = tl.sum(x, 0) / DIM
        centred = tl.where(inside, x - mean, 0.0)
        variance = tl.sum(centred * centred, 0) / DIM
        scale_row = scale_ptr + row * scale_stride + SCALE_AT * DIM
        scale = tl.load(scale_row + columns, mask=inside, other=0.0)
        if ADD_ONE:
            scale += 1.0
        shift_row = shift_ptr + row * scale_stride + SHIFT_AT * DIM
        shift = tl.load(shift_row + columns, mask=inside, other=0.0)
        out = centred * tl.rsqrt(variance + eps) * scale + shift
        tl.store(out_ptr + token * DIM + columns, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rms(x_ptr, weight_ptr, offset, eps, columns, inside, DIM: tl.constexpr):
    """RMS-normalised row: rounded to x's dtype, then scaled in fp32."""
    x = tl.load(x_ptr + offset + columns, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    factor = tl.rsqrt(tl.sum(wide * wide, 0) / DIM + eps)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    return (wide * factor).to(x.dtype).to(tl.float32) * weight


@triton.jit
def _rms_kernel(x_ptr, weight_ptr, out_ptr, eps, DIM: tl.constexpr, BLOCK: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * DIM
    columns = tl.arange(0, BLOCK)
    inside = columns < DIM
    y = _rms(x_ptr, weight_ptr, offset, eps, columns, inside, DIM)
    tl.store(out_ptr + offset + columns, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rotate(y, cos, sin, BLOCK: tl.constexpr):
    even, odd = tl.split(tl.reshape(y, [BLOCK // 2, 2]))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), [BLOCK])


@triton.jit
def _rms_rope_kernel(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, eps,
    DIM: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < DIM
    pair = token * PAIRS + tl.arange(0, BLOCK // 2) % PAIRS
    cos, sin = tl.load(cos_ptr + pair), tl.load(sin_ptr + pair)
    offset = token * DIM
    q = _rms(q_ptr, q_weight_ptr, offset, eps, columns, inside, DIM)
    q = _rotate(q, cos, sin, BLOCK).to(q_out_ptr.dtype.element_ty)
    tl.store(q_out_ptr + offset + columns, q, mask=inside)
    k = _rms(k_ptr, k_weight_ptr, offset, eps, columns, inside, DIM)
    k = _rotate(k, cos, sin, BLOCK).to(k_out_ptr.dtype.element_ty)
    tl.store(k_out_ptr + offset + columns, k, mask=inside)


@triton.jit
def _rms_rope_keep_kernel(
    q_ptr, k_ptr, v_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, slots_ptr,
    q_out_ptr, cache_k_ptr, cache_v_ptr, frame_tokens, eps,
    DIM: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < DIM
    pair = token * PAIRS + tl.arange(0, BLOCK // 2) % PAIRS
    cos, sin = tl.load(cos_ptr + pair), tl.load(sin_ptr + pair)
    offset = token * DIM
    frame = token // frame_tokens
    row = tl.load(slots_ptr + frame) * frame_tokens + token - frame * frame_tokens
    kept = row * DIM
    k = _rms(k_ptr, k_weight_ptr, offset, eps, columns, inside, DIM)
    k = _rotate(k, cos, sin, BLOCK).to(cache_k_ptr.dtype.element_ty)
    tl.store(cache_k_ptr + kept + columns, k, mask=inside)
    v = tl.load(v_ptr + offset + columns, mask=inside, other=0.0)
    tl.store(cache_v_ptr + kept + columns, v, mask=inside)
    if QUERIES:
        q = _rms(q_ptr, q_weight_ptr, offset, eps, columns, inside, DIM)
        q = _rotate(q, cos, sin, BLOCK).to(q_out_ptr.dtype.element_ty)
        tl.store(q_out_ptr + offset + columns, q, mask=inside)


@torch.library.triton_op("wanexport::modulated_norm", mutates_args=())
def modulated_norm(
    x: Tensor, table: Tensor, scale: int, shift: int, eps: float, dtype: torch.dtype
) -> Tensor:
    """LayerNorm of x [R, n, dim] fp32, times 1 + scale, plus shift, rounded to dtype.

    table [1 or R, 6, dim] fp32 holds both; scale and shift say in which of its rows.
    """
    out = torch.empty_like(x, dtype=dtype)
    _launch(x, None, None, (table, table), None, out, (0, scale, shift), eps)
    return out


@torch.library.triton_op("wanexport::add_modulated_norm", mutates_args=())
def add_modulated_norm(
    x: Tensor, y: Tensor, table: Tensor, scale: int, shift: int, eps: float
) -> tuple[Tensor, Tensor]:
    """x + y [R, n, dim] fp32, and its `modulated_norm` in the dtype of y."""
    total, out = torch.empty_like(x), torch.empty_like(y)
    _launch(x, y, None, (table, table), total, out, (0, scale, shift), eps)
    return total, out


@torch.library.triton_op("wanexport::add_gated_norm", mutates_args=())
def add_gated_norm(
    x: Tensor, y: Tensor, table: Tensor, gate: int, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x + y * gate [R, n, dim] fp32, and its LayerNorm with weight and bias in the dtype of y."""
    total, out = torch.empty_like(x), torch.empty_like(y)
    _launch(x, y, table, (weight, bias), total, out, (gate, 0, 0), eps)
    return total, out


@torch.library.triton_op("wanexport::add_gated", mutates_args=())
def add_gated(x: Tensor, y: Tensor, table: Tensor, gate: int) -> Tensor:
    """x + y * gate: x [R, n, dim] fp32, y of any dtype, gate a row of table [1 or R, 6, dim]."""
    total = torch.empty_like(x)
    _launch(x, y, table, None, total, None, (gate, 0, 0), 0.0)
    return total


def _launch(
    x: Tensor,
    y: Tensor | None,
    gates: Tensor | None,
    affine: tuple[Tensor, Tensor] | None,  # scales and shifts: tables, or weight and bias [dim]
    total: Tensor | None,
    out: Tensor | None,
    rows: tuple[int, int, int],  # of gate, scale and shift in their tables
    eps: float,
) -> None:
    num_rows, tokens, dim = x.shape
    scales, shifts = affine or (x, x)
    written = out if total is None else total
    block = triton.next_power_of_2(dim)
    torch.library.wrap_triton(_norm_kernel)[(num_rows * tokens,)](
        x,
        x if y is None else y,
        x if gates is None else gates,
        scales,
        shifts,
        written if total is None else total,  # what a kernel does not use still needs a pointer
        written if out is None else out,
        tokens,
        _row_stride(gates),
        _row_stride(scales if affine else None),
        eps,
        DIM=dim,
        BLOCK=block,
        GATE_AT=rows[0],
        SCALE_AT=rows[1],
        SHIFT_AT=rows[2],
        RESIDUAL=y is not None,
        GATED=gates is not None,
        NORM=affine is not None,
        ADD_ONE=affine is not None and scales.dim() == 3,  # a weight is the factor itself
        num_warps=_warps(block),
    )


def _row_stride(table: Tensor | None) -> int:
    """Elements from one row's modulation to the next's; 0 where all tokens share one."""
    if table is None or table.dim() < 3 or table.shape[0] == 1:
        return 0
    return table.shape[1] * table.shape[2]


@torch.library.triton_op("wanexport::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of x [L, dim] over dim, as `wan.RMSNorm`, rounded to the dtype of x."""
    out = torch.empty_like(x)
    block = triton.next_power_of_2(x.shape[-1])
    torch.library.wrap_triton(_rms_kernel)[(x.shape[0],)](
        x, weight, out, eps, DIM=x.shape[-1], BLOCK=block, num_warps=_warps(block)
    )
    return out


@torch.library.triton_op("wanexport::rms_norm_rope", mutates_args=())
def rms_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """RMS norm and rotary embedding of q and k [1, L, dim], rounded to their dtype.

    cos and sin are [1, L, 1, head_dim / 2] fp32; head_dim must be a power of two.
    """
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    dim = q.shape[-1]
    block = triton.next_power_of_2(dim)
    torch.library.wrap_triton(_rms_rope_kernel)[(q.shape[0] * q.shape[1],)](
        q, k, q_weight, k_weight, cos, sin, q_out, k_out, eps,
        DIM=dim, PAIRS=cos.shape[-1], BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return q_out, k_out


@torch.library.triton_op("wanexport::keep", mutates_args={"cache_k", "cache_v"})
def keep(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    eps: float,
) -> Tensor:
    """`rms_norm_rope` of q and k [L, dim], where k goes into its slots of the cache, as v does.

    slots [C] int64 says where each of the C frames, of L / C tokens, is kept in cache_k and cache_v
    [1, S * L / C, H, D]. Returns the queries [L, dim]; without q, an empty tensor.
    """
    tokens, dim = k.shape
    q_out = k.new_empty(0) if q is None else torch.empty_like(q)
    block = triton.next_power_of_2(dim)
    torch.library.wrap_triton(_rms_rope_keep_kernel)[(tokens,)](
        k if q is None else q, k, v, q_weight, k_weight, cos, sin, slots,
        k if q is None else q_out, cache_k, cache_v, tokens // slots.shape[0], eps,
        DIM=dim, PAIRS=cos.shape[-1], BLOCK=block, QUERIES=q is not None,
        num_warps=_warps(block),
    )  # fmt: skip
    return q_out
