"""RoPE against the strided original (diffusers) and the complex128 original (Wan)."""

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import Tensor

from wanexport.graphs.rope import apply_rope, axis_dims, axis_table, combine_axes

VIDEO_GRID = (8, 32, 32)  # 8192 tokens


def tables(grid: tuple[int, int, int], head_dim: int = 128) -> tuple[Tensor, Tensor]:
    axes = zip(grid, axis_dims(head_dim))
    return combine_axes(*(axis_table(length, dim) for length, dim in axes))


def strided(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The in-place form that diffusers uses, with tables of half width."""
    out = torch.empty_like(x)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    out[..., 0::2] = even * cos - odd * sin
    out[..., 1::2] = even * sin + odd * cos
    return out.type_as(x)


def complex_original(x: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Wan's rope_apply on [1, L, H, D]: complex128 tables, one for each axis."""
    f, r, c = grid
    parts = []
    for dim, length, view in zip(axis_dims(x.shape[-1]), grid, ((f, 1, 1), (1, r, 1), (1, 1, c))):
        freqs = 1.0 / 10000 ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles = torch.outer(torch.arange(length, dtype=torch.float64), freqs)
        turn = torch.polar(torch.ones_like(angles), angles)
        parts.append(turn.view(*view, -1).expand(f, r, c, -1))
    turns = torch.cat(parts, -1).reshape(1, f * r * c, 1, -1)
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2)


def test_axes_of_a_head_of_128() -> None:
    assert axis_dims(128) == (44, 42, 42)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bit_equal_to_strided_writes_at_video_scale(dtype: torch.dtype) -> None:
    x = torch.randn(1, 8192, 2, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    cos, sin = tables(VIDEO_GRID)
    rotated = apply_rope(x, cos, sin)
    torch.testing.assert_close(rotated, strided(x, cos, sin), atol=0, rtol=0)
    assert rotated.is_contiguous()
    assert rotated.dtype == dtype


@pytest.mark.parametrize("seed", range(4))
def test_within_one_bf16_ulp_of_the_complex_original(seed: int) -> None:
    x = torch.randn(1, 8192, 2, 128, generator=torch.Generator().manual_seed(seed)).bfloat16()
    rotated, exact = apply_rope(x, *tables(VIDEO_GRID)), complex_original(x, VIDEO_GRID)
    ulps = rotated.view(torch.int16).int() - exact.bfloat16().view(torch.int16).int()
    # Where a pair's products cancel to almost nothing, what is left has the rounding of fp32.
    pair_norm = (
        x.double().unflatten(-1, (-1, 2)).norm(dim=-1, keepdim=True).expand(-1, -1, -1, -1, 2)
    )
    cancelled = (rotated.double() - exact).abs() <= 2e-7 * pair_norm.flatten(-2)
    assert ((ulps.abs() <= 1) | cancelled).all()
    assert (ulps.abs() > 1).sum() < 10


def test_tables_are_diffusers_own() -> None:
    grid = (3, 4, 6)
    theirs = WanRotaryPosEmbed(128, (1, 2, 2), 1024)(torch.empty(1, 16, 3, 8, 12))
    for ours, other in zip(tables(grid), theirs):
        torch.testing.assert_close(ours.flatten(), other[..., 0::2].flatten(), atol=0, rtol=0)


@pytest.mark.parametrize("head_dim", [5, 127])
def test_odd_head_dim_is_refused(head_dim: int) -> None:
    table = torch.zeros(1, 4, 1, head_dim // 2)
    with pytest.raises(ValueError, match="even"):
        apply_rope(torch.zeros(1, 4, 1, head_dim), table, table)
    with pytest.raises(ValueError, match="even"):
        axis_dims(head_dim)


def test_tables_of_another_width_are_refused() -> None:
    cos, sin = tables((1, 2, 2), 64)
    with pytest.raises(ValueError, match="half its width"):
        apply_rope(torch.zeros(1, 4, 1, 128), cos, sin)
