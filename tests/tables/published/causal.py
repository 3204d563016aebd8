"""A causal Wan denoiser that reads the host values that lingbot-world's does, in three ways.

Maths of `WanModelFast` without camera and image input, in one dtype with an fp32 residual: a global
KV cache, RoPE in complex fp64, and the sequence-parallel attention of one rank. `Host.READ` reads
tensors wherever the code did before pull request 51, `PASSED` has the integers that it passes in,
`HOISTED` reads nothing.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.tables.published.causal_cache import (
    THETA,
    Cache,
    CausalSize,
    Host,
    Known,
    rope_table,
    rotate,
)
from tests.tables.published.wan import HEAD_DIM

FREQ_DIM, TEXT_DIM, PATCH, RANKS = 256, 4096, 64, 1


class RMSNorm(nn.Module):
    """Over all channels, in fp32, before the heads are split."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        factor = (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        return (wide * factor).type_as(x) * self.weight


class Attention(nn.Module):
    """Projections of one attention, split into heads."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim), RMSNorm(dim)

    def heads(self, x: Tensor) -> Tensor:
        """[B, n, dim] -> [B, n, heads, 128]."""
        return x.unflatten(2, (-1, HEAD_DIM))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention without a mask, and the output projection: [B, n, dim]."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out: Tensor = self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class CausalAttention(Attention):
    """Self-attention to the chunk and all before it; the cache is written first."""

    def forward(
        self,
        x: Tensor,
        lengths: Tensor,  # int64 scalar on the CPU
        grids: Tensor,  # int64 [1, 3] on the CPU
        table: Tensor,
        cache: Cache,
        known: Known,
        grid: list[int],
    ) -> Tensor:
        q, k = self.heads(self.norm_q(self.q(x))), self.heads(self.norm_k(self.k(x)))
        v = self.heads(self.v(x))
        tokens = int(lengths) if known.tokens is None else known.tokens
        frame = known.frame_tokens
        if frame is None:
            frame = int(math.prod(grids[0][1:]).item())  # type: ignore[attr-defined]
        first = known.start // frame
        hoisted = known.host is Host.HOISTED
        q = rotate(q, [grid] if hoisted else grids.tolist(), table, first)
        k = rotate(k, [grid] if hoisted else grids.tolist(), table, first)
        q, k, v = q[:, :tokens], k[:, :tokens], v[:, :tokens]
        return self.attend(q, *_cached(k, v, lengths, tokens, cache, known))


def _cached(
    k: Tensor, v: Tensor, lengths: Tensor, tokens: int, cache: Cache, known: Known
) -> tuple[Tensor, Tensor]:
    """Write a chunk's keys and values, and return all that is attended to."""
    end: Any = known.start + (tokens if known.host is Host.HOISTED else lengths)
    start: Any = known.start
    local_end: Any = known.start + tokens
    if known.host is Host.READ:
        local_end = cache.local_end.item() + end - cache.global_end.item()
        start = local_end - lengths
    cache.k[:, start:local_end] = k
    cache.v[:, start:local_end] = v
    keys = cache.k[:, max(0, local_end - known.limit) : local_end]
    values = cache.v[:, max(0, local_end - known.limit) : local_end]
    if known.host is not Host.HOISTED:
        cache.global_end.fill_(end)
        cache.local_end.fill_(local_end)
    return keys, values


class TextAttention(Attention):
    """Cross-attention; keys and values of the text are computed in the first forward only."""

    def forward(self, x: Tensor, text: Tensor, cache: Cache, known: Known) -> Tensor:
        q = self.heads(self.norm_q(self.q(x)))
        first = cache.is_init.item() == 0 if known.is_first is None else known.is_first
        if first:
            if known.host is not Host.HOISTED:
                cache.is_init.fill_(1)
            cache.text_k.copy_(self.heads(self.norm_k(self.k(text))))
            cache.text_v.copy_(self.heads(self.v(text)))
        return self.attend(q, cache.text_k, cache.text_v)


def _norm(x: Tensor) -> Tensor:
    """LayerNorm in fp32, of the dtype of x."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=1e-6).type_as(x)


class Block(nn.Module):
    """Self-attention, cross-attention and MLP; the residual is fp32."""

    def __init__(self, size: CausalSize) -> None:
        super().__init__()
        dim = size.dim
        self.self_attn, self.cross_attn = CausalAttention(dim), TextAttention(dim)
        self.norm3 = nn.LayerNorm(dim, eps=1e-6)
        self.ffn = nn.Sequential(
            nn.Linear(dim, size.ffn_dim), nn.GELU("tanh"), nn.Linear(size.ffn_dim, dim)
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self,
        x: Tensor,  # fp32 [1, n, dim]
        e: Tensor,  # fp32 [1, n, 6, dim]
        text: Tensor,
        cache: Cache,
        *rest: Tensor,  # lengths, grids, table
        known: Known,
        grid: list[int],
    ) -> Tensor:
        low = text.dtype
        m = [part.squeeze(2) for part in (self.modulation[None] + e).chunk(6, dim=2)]
        y = (_norm(x).float() * (1 + m[1]) + m[0]).to(low)
        x = x + self.self_attn(y, *rest, cache, known, grid) * m[2]
        x = x + self.cross_attn(self.norm3(x.to(low)), text, cache, known)
        y = self.ffn((_norm(x).float() * (1 + m[4]) + m[3]).to(low))
        return x + y * m[5]


class Head(nn.Module):
    """The last norm, modulated by the timestep, and the projection to a patch."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)
        self.head = nn.Linear(dim, PATCH)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        shift, scale = (self.modulation[:, None] + e.float().unsqueeze(2)).chunk(2, dim=2)
        out: Tensor = self.head((_norm(x) * (1 + scale.squeeze(2)) + shift.squeeze(2)).to(e.dtype))
        return out


class CausalWan(nn.Module):
    """The velocity [n, 64] of one chunk, whose latents [n, 64] fp32 are patches already."""

    def __init__(self, size: CausalSize) -> None:
        super().__init__()
        dim = size.dim
        self.size = size
        self.patch, self.head = nn.Linear(PATCH, dim), Head(dim)
        self.text = nn.Sequential(nn.Linear(TEXT_DIM, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.time = nn.Sequential(nn.Linear(FREQ_DIM, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.table = rope_table()  # complex: no buffer, so that `to` leaves its dtype

    def forward(
        self, x: Tensor, t: Tensor, text: Tensor, caches: list[Cache], known: Known
    ) -> Tensor:
        """Also writes the keys and values of the chunk."""
        size, low = self.size, self.size.dtype
        self.table = self.table.to(x.device)
        grid = [size.frames, size.rows, size.columns]
        grids = torch.tensor([grid], dtype=torch.long)
        lengths = torch.tensor([x.shape[0]], dtype=torch.long)[0]
        tokens, known = _lengths(lengths, x.shape[0], known)
        e = self.time(_sinusoid(t.expand(tokens)).to(low))[None]
        e0 = self.time_projection(e).unflatten(2, (6, -1)).float()
        context = self.text(text.to(low))
        hidden = self.patch(x.to(low))[None].float()
        for block, cache in zip(self.blocks, caches, strict=True):
            rest = (lengths, grids, self.table)
            hidden = block(hidden, e0, context, cache, *rest, known=known, grid=grid)
        velocity: Tensor = self.head(hidden, e)[0].float()
        return velocity


def _lengths(lengths: Tensor, tokens: int, known: Known) -> tuple[int, Known]:
    """How many tokens there are, padded for the ranks, and what is known of it afterwards."""
    if known.host is Host.HOISTED:
        return tokens, replace(known, tokens=tokens)
    assert lengths.max() <= tokens
    if known.host is Host.PASSED:
        read = int(lengths)
        return (read + RANKS - 1) // RANKS * RANKS, replace(known, tokens=read)
    padded = int((lengths + RANKS - 1) // RANKS * RANKS)
    assert padded == int(lengths)
    return padded, known


def _sinusoid(t: Tensor) -> Tensor:
    """Of timesteps [n], computed in fp64: [n, 256] fp32."""
    half = FREQ_DIM // 2
    steps = torch.arange(half, dtype=torch.float64, device=t.device) / half
    angles = torch.outer(t.double(), THETA**-steps)
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()
