"""Causal Wan: a chunk of latent frames that attends to earlier ones by a cache of keys and values.

Parameters are plain Wan2.1's. Keys are kept after norm and RoPE, whose frame angle is that of the
frame's number in the whole video. The cache is state, written in place.
Source: guandeh17/Self-Forcing, `wan/modules/causal_model.py`.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from wanexport.graphs.rope import apply_rope, axis_dims, axis_table, combine_axes
from wanexport.graphs.wan import Block, Modulation, SelfAttention, WanModel
from wanexport.runtime.causal_wan import MAX_FRAMES
from wanexport.runtime.engines.operators import attention, cached_attention
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.wan_config import WanConfig


class Chunk(NamedTuple):
    """What steers the blocks, and where the chunk's frames are: C frames of n tokens."""

    modulation: Tensor  # [C, 6, dim] fp32
    cos: Tensor  # [1, C * n, 1, head_dim/2] fp32
    sin: Tensor
    slots: Tensor  # [C] int64: where in the cache each frame is kept
    keys: Tensor | None = None  # [1] int64: tokens of the cache that are attended to


class Kept(NamedTuple):
    """The state of one layer. The cache is [1, S * n, H, D], of the text [1, text_len, H, D]."""

    cache_k: Tensor
    cache_v: Tensor
    text_k: Tensor
    text_v: Tensor


class CausalAttention(SelfAttention):
    """Attention of a chunk's tokens to those of the cache, its own among them."""

    def keep(self, x: Tensor, chunk: Chunk, cache_k: Tensor, cache_v: Tensor) -> None:
        """Write keys and values of the chunk's frames into their slots."""
        v = self.heads(self.v(x))
        k = apply_rope(self.heads(self.norm_k(self.k(x))), chunk.cos, chunk.sin).to(v.dtype)
        rows = rows_of(chunk.slots, x.shape[1])
        cache_k.index_copy_(1, rows, k)
        cache_v.index_copy_(1, rows, v)

    def attend(self, x: Tensor, chunk: Chunk, kept: Kept) -> Tensor:
        """What the chunk's queries find among the first `keys` tokens of the cache."""
        q = apply_rope(self.heads(self.norm_q(self.q(x))), chunk.cos, chunk.sin)
        q = q.to(kept.cache_k.dtype)
        assert chunk.keys is not None
        out = cached_attention(q, kept.cache_k, kept.cache_v, chunk.keys, "cache")
        return self.o(out.reshape(x.shape))


class CausalBlock(Block):
    """One block on x [C, n, dim] fp32, every frame of the chunk with its own timestep."""

    self_attn: CausalAttention

    def __init__(self, config: WanConfig) -> None:
        super().__init__(config)
        self.self_attn = CausalAttention(config)

    def forward(  # type: ignore[override]
        self, x: Tensor, chunk: Chunk, cache_k: Tensor, cache_v: Tensor, *text: Tensor
    ) -> Tensor:
        """The residual stream after the block; without text, only keys and values are written."""
        rows = self.modulation + chunk.modulation
        attn, ffn = (
            Modulation(rows[:, i : i + 1], rows[:, i + 1 : i + 2], rows[:, i + 2 : i + 3])
            for i in (0, 3)
        )
        y = self.norm1(x) * (1 + attn.scale) + attn.shift
        self.self_attn.keep(y, chunk, cache_k, cache_v)
        if not text:
            return x
        y = self.self_attn.attend(y, chunk, Kept(cache_k, cache_v, *text))
        x = x + y.float() * attn.gate
        x = x + self.read_text(self.norm3(x), *text).float()
        y = self.ffn(self.norm2(x) * (1 + ffn.scale) + ffn.shift)
        return x + y.float() * ffn.gate

    def read_text(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention to the text, whose keys and values are kept."""
        layer = self.cross_attn
        q = layer.heads(layer.norm_q(layer.q(x))).to(v.dtype)
        return layer.o(attention(q, k, v, "text").reshape(x.shape))

    def keep_text(self, context: Tensor, text_k: Tensor, text_v: Tensor) -> None:
        """Write keys and values of the text [1, text_len, dim]."""
        layer = self.cross_attn
        text_k.copy_(layer.heads(layer.norm_k(layer.k(context))))
        text_v.copy_(layer.heads(layer.v(context)))


def rows_of(slots: Tensor, tokens: int) -> Tensor:
    """The tokens of the cache that slots [C] of so many tokens are: [C * tokens]."""
    within = torch.arange(tokens, device=slots.device)
    return (slots[:, None] * tokens + within).flatten()


class CausalWan(WanModel):
    """The denoiser of one chunk; what it keeps are the Program's state tensors.

    A frame past the table of angles, which only fills a chunk up, has the table's last.
    """

    frame_offsets: Tensor

    def __init__(
        self, config: WanConfig, geometry: Geometry, dtype: torch.dtype, fused: bool = False
    ) -> None:
        super().__init__(config, geometry, dtype)
        kind = _fused_block() if fused else CausalBlock
        self.blocks = nn.ModuleList(kind(config) for _ in range(config.num_layers))
        frames = axis_table(MAX_FRAMES, axis_dims(config.head_dim)[0])
        self.register_buffer("rope_frames", frames, persistent=False)
        offsets = torch.arange(geometry.chunk, device="cpu")
        self.register_buffer("frame_offsets", offsets, persistent=False)
        self.freeze()

    def text(self, text: Tensor) -> dict[str, Tensor]:
        """Text embeddings [1, text_len, text_dim] as the blocks read them."""
        return {"context": self.text_embedding(text)}

    def text_block(
        self, index: int, context: Tensor, text_k: Tensor, text_v: Tensor
    ) -> dict[str, Tensor]:
        """One layer's keys and values of the text, which are written."""
        self._block(index).keep_text(context, text_k, text_v)
        return {}

    def _block(self, index: int) -> CausalBlock:
        block = self.blocks[index]
        assert isinstance(block, CausalBlock)
        return block

    def embed(  # type: ignore[override]
        self, latent: Tensor, timestep: Tensor, position: Tensor
    ) -> dict[str, Tensor]:
        """What plain Wan's embedding writes but for the text, from the chunk's place on."""
        x = self.patch_embedding(self.patchify(latent))
        x = x.reshape(self.geometry.chunk, -1, self.config.dim)
        time, modulation = self.embed_time(timestep)
        numbers = (position + self.frame_offsets).clamp(max=MAX_FRAMES - 1)
        frames = self.rope_frames.index_select(1, numbers)
        cos, sin = combine_axes(frames, self.rope_rows, self.rope_columns)
        return {"x": x, "time": time, "modulation": modulation, "cos": cos, "sin": sin}

    def block(  # type: ignore[override]
        self, index: int, x: Tensor, *, cache_k: Tensor, cache_v: Tensor,
        text_k: Tensor, text_v: Tensor, **chunk: Tensor,
    ) -> dict[str, Tensor]:  # fmt: skip
        """The residual stream after one layer, whose part of the cache is written."""
        kept = Kept(cache_k, cache_v, text_k, text_v)
        return {"x": self.blocks[index](x, Chunk(**chunk), *kept)}

    def commit_keep(
        self, index: int, x: Tensor, *, cache_k: Tensor, cache_v: Tensor, **chunk: Tensor
    ) -> dict[str, Tensor]:
        """Write what the last layer keeps of a finished chunk: nothing after it is needed."""
        self.blocks[index](x, Chunk(**chunk), cache_k, cache_v)
        return {}


def _fused_block() -> type[CausalBlock]:
    from wanexport.graphs.causal_fused import FusedCausalBlock  # needs Triton

    return FusedCausalBlock
