"""Rotary embedding of interleaved pairs in the forms that were published, same maths in each.

x is [B, S, H, D]. In Wan's form cos and sin are [1, S, 1, D] with each value twice; Helios has both
in one table [B, S, 2 D]. A product is computed in the wider dtype of the two and rounded to that of
x at the end, by the write into the output or by `type_as`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Rotate = Callable[[Tensor, Tensor, Tensor], Tensor]
RotateBoth = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The even and the odd channels of x after the rotation; cos and sin have D / 2 channels."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return even * cos - odd * sin, even * sin + odd * cos


def strided(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As diffusers' Wan: both halves are written with a stride of two into an empty output."""
    even, odd = rotated(x, cos[..., 0::2], sin[..., 1::2])
    out = torch.empty_like(x)
    out[..., 0::2] = even
    out[..., 1::2] = odd
    return out.type_as(x)


def stacked(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As vLLM-Omni's pull request 2393: both halves are stacked, and written once."""
    even, odd = rotated(x, cos[..., 0::2], sin[..., 1::2])
    return torch.stack((even, odd), dim=-1).flatten(-2, -1).type_as(x)


def helios_tables(freqs: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [B, S, 1, D] out of Helios' table [B, S, 2 D]."""
    cos, sin = freqs.unsqueeze(-2).chunk(2, dim=-1)
    return cos, sin


def strided_helios(x: Tensor, freqs: Tensor) -> Tensor:
    """As diffusers' and vLLM-Omni's Helios had it: strided writes."""
    return strided(x, *helios_tables(freqs))


def stacked_helios(x: Tensor, freqs: Tensor) -> Tensor:
    """As vLLM-Omni's pull request 2474: stack and flatten."""
    return stacked(x, *helios_tables(freqs))


def both(rotate: Rotate) -> RotateBoth:
    """The same rotation of query and key."""
    return lambda q, k, cos, sin: (rotate(q, cos, sin), rotate(k, cos, sin))


def complex_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotation as a product of complex numbers in fp64, as the official code computes it."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    angles = torch.complex(cos[..., 0::2].double(), sin[..., 1::2].double())
    return torch.view_as_real(pairs * angles).flatten(-2)


def differing(a: Tensor, b: Tensor) -> str:
    """`the same bits`, or the share of elements that differ."""
    if torch.equal(a, b):
        return "the same bits"
    return f"{100 * (a != b).float().mean().item():.2g} % of elements differ"
