"""The causal block with its element-wise work in Triton kernels, for CUDA engines.

Parameters, result and roundings are those of `causal.CausalBlock`.
"""

from typing import cast

from torch import Tensor, nn

from wanexport.graphs import kernels
from wanexport.graphs.causal import CausalBlock, Chunk
from wanexport.graphs.fused_block import (
    FFN_GATE,
    FFN_SCALE,
    FFN_SHIFT,
    GATE,
    SCALE,
    SHIFT,
    flat_linear,
)
from wanexport.runtime.engines.operators import attention, cached_attention, linear_gelu


class FusedCausalBlock(CausalBlock):
    """One block on x [C, n, dim] fp32: kernels of ours beside products, attention and the cache."""

    def forward(  # type: ignore[override]
        self, x: Tensor, chunk: Chunk, cache_k: Tensor, cache_v: Tensor, *text: Tensor
    ) -> Tensor:
        """The residual stream after the block; without text, only keys and values are written."""
        table = self.modulation + chunk.modulation
        dtype = self.self_attn.k.weight.dtype
        h = kernels.modulated_norm(x, table, SCALE, SHIFT, self.norm1.eps, dtype).flatten(0, 1)
        q = self._keep(h, chunk, cache_k, cache_v, queries=bool(text))
        if not text:
            return x
        assert chunk.keys is not None
        out = cached_attention(self.self_attn.heads(q), cache_k, cache_v, chunk.keys, "cache")
        y = flat_linear(self.self_attn.o, out.view(h.shape)).view(x.shape)
        norm = self.norm3
        x, h = kernels.add_gated_norm(x, y, table, GATE, norm.weight, norm.bias, norm.eps)
        y = self._attend_text(h.flatten(0, 1), *text).view(x.shape)
        x, h = kernels.add_modulated_norm(x, y, table, FFN_SCALE, FFN_SHIFT, self.norm2.eps)
        up, _, down = cast(tuple[nn.Linear, nn.Module, nn.Linear], tuple(self.ffn))
        y = flat_linear(down, linear_gelu(h.flatten(0, 1), up.weight, up.bias)).view(x.shape)
        return kernels.add_gated(x, y, table, FFN_GATE)

    def _keep(
        self, h: Tensor, chunk: Chunk, cache_k: Tensor, cache_v: Tensor, *, queries: bool
    ) -> Tensor:
        """The queries of h [L, dim], whose keys and values are written into their slots."""
        layer = self.self_attn
        q = flat_linear(layer.q, h) if queries else None
        k, v = flat_linear(layer.k, h), flat_linear(layer.v, h)
        weights = layer.norm_q.weight if queries else layer.norm_k.weight, layer.norm_k.weight
        place = chunk.cos, chunk.sin, chunk.slots
        return kernels.keep(q, k, v, *weights, *place, cache_k, cache_v, layer.norm_k.eps)

    def _attend_text(self, h: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layer = self.cross_attn
        q = kernels.rms_norm(flat_linear(layer.q, h), layer.norm_q.weight, layer.norm_q.eps)
        out = attention(layer.heads(q), k, v, "text")
        return flat_linear(layer.o, out.view(h.shape))
