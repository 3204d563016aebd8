"""Rotary position embedding over (frame, row, column), in real fp32 arithmetic.

Formulas: Su et al., RoFormer, section 3.4.2, applied to three axes as in Wan's `rope_params` and
`rope_apply`: pairs are interleaved, (x[2j], x[2j+1]) is rotated by the angle of pair j.
"""

import torch
from torch import Tensor

THETA = 10000.0


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """Split head_dim into the even sizes of the frame, row and column axes: 128 -> 44, 42, 42.

    Raises ValueError when head_dim is odd or leaves an axis without a pair.
    """
    side = 2 * (head_dim // 6)
    if head_dim % 2 or side == 0:
        raise ValueError(
            f"RoPE rotates pairs: head_dim must be even and at least 6, got {head_dim}"
        )
    return head_dim - 2 * side, side, side


def axis_table(length: int, dim: int) -> Tensor:
    """Return cos and sin of p * 10000^(-2i/dim) for positions p < length and pairs i < dim/2.

    The angles are fp64, the [2, length, dim/2] result is fp32.
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim
    positions = torch.arange(length, dtype=torch.float64, device="cpu")
    angles = torch.outer(positions, THETA**-exponents)
    return torch.stack([angles.cos(), angles.sin()]).float()


def combine_axes(frames: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Combine three `axis_table` results to cos and sin over the grid, each [1, L, 1, head_dim/2].

    L counts frame-major, then row, then column, as Wan orders its tokens.
    """
    f, r, c = frames.shape[1], rows.shape[1], columns.shape[1]
    grid = torch.cat(
        [
            frames[:, :, None, None].expand(2, f, r, c, -1),
            rows[:, None, :, None].expand(2, f, r, c, -1),
            columns[:, None, None, :].expand(2, f, r, c, -1),
        ],
        dim=-1,
    ).reshape(2, 1, f * r * c, 1, -1)
    return grid[0], grid[1]


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs of x [B, L, H, D] by cos, sin [1, L, 1, D/2]; dtype of x, contiguous.

    The products are computed in the wider of the two dtypes. Raises ValueError when D is odd or
    the tables have another width than D/2.
    """
    head_dim = x.shape[-1]
    if head_dim % 2 or cos.shape[-1] != head_dim // 2 or sin.shape[-1] != head_dim // 2:
        raise ValueError(
            f"RoPE needs an even head_dim and tables of half its width, "
            f"got head_dim {head_dim} and tables of {cos.shape[-1]} and {sin.shape[-1]}"
        )
    even, odd = x[..., 0::2], x[..., 1::2]
    rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return rotated.flatten(-2).to(x.dtype)
