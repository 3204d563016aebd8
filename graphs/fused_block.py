"""The transformer block with its element-wise work in Triton kernels, for CUDA engines.

Parameters, result and roundings are those of `wan.Block`.
"""

from typing import cast

import torch
from torch import Tensor, nn

from wanexport.graphs import kernels
from wanexport.graphs.wan import Block, Conditioning, CrossAttention, SelfAttention
from wanexport.runtime.engines.operators import attention, linear_gelu

# Rows of the modulation table.
SHIFT, SCALE, GATE, FFN_SHIFT, FFN_SCALE, FFN_GATE = range(6)


class FusedBlock(Block):
    """One block on x [R, n, dim] fp32: six kernels of ours beside the products and attention."""

    def forward(self, x: Tensor, cond: Conditioning) -> Tensor:
        table = self.modulation + cond.modulation
        up, _, down = cast(tuple[nn.Linear, nn.Module, nn.Linear], tuple(self.ffn))
        dtype = up.weight.dtype
        h = kernels.modulated_norm(x, table, SCALE, SHIFT, self.norm1.eps, dtype)
        y = _self_attention(self.self_attn, h, cond)
        norm = self.norm3
        x, h = kernels.add_gated_norm(x, y, table, GATE, norm.weight, norm.bias, norm.eps)
        y = _cross_attention(self.cross_attn, h, cond)
        x, h = kernels.add_modulated_norm(x, y, table, FFN_SCALE, FFN_SHIFT, self.norm2.eps)
        y = flat_linear(down, linear_gelu(h.flatten(0, 1), up.weight, up.bias)).view(x.shape)
        return kernels.add_gated(x, y, table, FFN_GATE)


def _self_attention(layer: SelfAttention, h: Tensor, cond: Conditioning) -> Tensor:
    flat = h.flatten(0, 1)
    q, k, v = (flat_linear(linear, flat)[None] for linear in (layer.q, layer.k, layer.v))
    weights = layer.norm_q.weight, layer.norm_k.weight
    q, k = kernels.rms_norm_rope(q, k, *weights, cond.cos, cond.sin, layer.norm_q.eps)
    out = attention(layer.heads(q), layer.heads(k), layer.heads(v), "self")
    return flat_linear(layer.o, out.view(flat.shape)).view(h.shape)


def _cross_attention(layer: CrossAttention, h: Tensor, cond: Conditioning) -> Tensor:
    flat = h.flatten(0, 1)
    q = kernels.rms_norm(flat_linear(layer.q, flat), layer.norm_q.weight, layer.norm_q.eps)
    q = layer.heads(q)
    k, v = layer.norm_k(layer.k(cond.context)), layer.v(cond.context)
    out = attention(q, layer.heads(k).to(v.dtype), layer.heads(v), "text")
    if cond.image_context is not None:
        tokens = cond.image_context
        k, v = layer.norm_k_img(layer.k_img(tokens)), layer.v_img(tokens)
        image = attention(q, layer.heads(k).to(v.dtype), layer.heads(v), "image")
        out = (out.float() + image.float()).to(v.dtype)
    return flat_linear(layer.o, out.view(flat.shape)).view(h.shape)


def flat_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """The product on [L, in]: in two dimensions cuBLASLt adds the bias in the same kernel."""
    return torch.addmm(layer.bias, x, layer.weight.t())
