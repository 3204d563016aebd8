"""diffusers' Wan block with its three norm and element-wise functions as functions.

The three are those that SGLang compiled: LayerNorm with scale and shift, the same after a gated
residual, and the last gated residual. The maths and the roundings are those of
`WanTransformerBlock`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


def norm_scale_shift(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """LayerNorm of x in fp32, times 1 + scale, plus shift; of the dtype of x."""
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
    return (normed * (1 + scale) + shift).type_as(x)


def residual_norm(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    affine: tuple[Tensor, Tensor] | None,  # weight and bias
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """x + y * gate, and its LayerNorm, either affine or with scale and shift."""
    x = x + y if gate is None else (x.float() + y * gate).type_as(x)
    weight, bias = affine or (None, None)
    normed = F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps)
    if scale is not None and shift is not None:
        normed = normed * (1 + scale) + shift
    return x, normed.type_as(x)


def mul_add(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + y * gate in fp32, of the dtype of x."""
    return (x.float() + y.float() * gate).type_as(x)


class Functions(NamedTuple):
    """The three functions, as they are or compiled."""

    norm: Callable[..., Tensor] = norm_scale_shift
    residual: Callable[..., tuple[Tensor, Tensor]] = residual_norm
    add: Callable[..., Tensor] = mul_add

    def compiled(self) -> "Functions":
        """Each compiled by itself."""
        compiled: list[Any] = [torch.compile(f, dynamic=False, fullgraph=True) for f in self]
        return Functions(*compiled)


def forward(
    block: Any,
    functions: Functions,
    x: Tensor,
    text: Tensor,
    temb: Tensor,
    rotary: tuple[Tensor, Tensor],
) -> Tensor:
    """What a text-to-video block of diffusers computes."""
    table = block.scale_shift_table + temb.float()
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = table.chunk(6, dim=1)
    eps, affine = block.norm1.eps, (block.norm2.weight, block.norm2.bias)
    y = block.attn1(functions.norm(x, scale, shift, eps), None, None, rotary)
    x, normed = functions.residual(x, y, gate, affine, None, None, eps)
    y = block.attn2(normed, text, None, None)
    x, normed = functions.residual(x, y, None, None, ffn_scale, ffn_shift, eps)
    return functions.add(x, block.ffn(normed), ffn_gate)


def put(model: Any, functions: Functions) -> Any:
    """The model with these functions in every block."""
    for block in model.blocks:
        block.forward = partial(forward, block, functions)
    return model
