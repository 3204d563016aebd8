"""The Wan DiT for one geometry: tensors in, a tensor out, every size a Python int.

One definition covers Wan2.1 and Wan2.2 T2V, I2V, FLF2V and TI2V. Parameter names are the official
ones (Wan-Video/Wan2.1 `wan/modules/model.py`). The precision policy is the official code's under
bf16 autocast, as written casts: the residual stream, norms, modulation, time MLP, RoPE and head are
fp32; the other matrix products and attention run in `dtype`. A matrix product runs in the dtype of
its weight, so `graph.parameter_dtype` is the whole policy for the weights.

Not here: sampling, checkpoints, and which kernel attention uses.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanexport.graphs.graph import Graph
from wanexport.graphs.rope import apply_rope, axis_dims, axis_table, combine_axes
from wanexport.runtime.bundle.signature import program_of
from wanexport.runtime.engines.operators import attention
from wanexport.runtime.geometry import PATCH, Geometry
from wanexport.runtime.wan_config import IMAGE_DIM, WanConfig


class Linear(nn.Linear):
    """A matrix product in the dtype of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class LayerNorm(nn.LayerNorm):
    """LayerNorm in fp32; fp32 out."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """RMS norm over all heads jointly: normalised in fp32, rounded to x's dtype, scaled in fp32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:  # nothing to round: one node instead of two
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype) * self.weight


class Modulation(NamedTuple):
    """Shift, scale and gate of one branch of a block, each [R, 1, dim] fp32."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


class Conditioning(NamedTuple):
    """What every block attends to and is steered by. R is 1, or F with one timestep per frame."""

    modulation: Tensor  # [R, 6, dim] fp32
    context: Tensor  # [1, text_len, dim]
    cos: Tensor  # [1, L, 1, head_dim/2] fp32
    sin: Tensor
    image_context: Tensor | None = None  # [1, 257 or 514, dim]


class AttentionLayer(nn.Module):
    """The projections and norms that self- and cross-attention share."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.q = Linear(config.dim, config.dim)
        self.k = Linear(config.dim, config.dim)
        self.v = Linear(config.dim, config.dim)
        self.o = Linear(config.dim, config.dim)
        self.norm_q = RMSNorm(config.dim, config.eps)
        self.norm_k = RMSNorm(config.dim, config.eps)

    def heads(self, x: Tensor) -> Tensor:
        """[R, n, dim] -> [1, R * n, H, D]."""
        return x.reshape(1, -1, self.num_heads, self.head_dim)


class SelfAttention(AttentionLayer):
    """Attention of all tokens to all tokens, with RoPE."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        v = self.heads(self.v(x))
        q = apply_rope(self.heads(self.norm_q(self.q(x))), cos, sin).to(v.dtype)
        k = apply_rope(self.heads(self.norm_k(self.k(x))), cos, sin).to(v.dtype)
        return self.o(attention(q, k, v, "self").reshape(x.shape))


class CrossAttention(AttentionLayer):
    """Attention to the text, and where the model has them to the image tokens, with one query."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__(config)
        if config.image_tokens:
            self.k_img = Linear(config.dim, config.dim)
            self.v_img = Linear(config.dim, config.dim)
            self.norm_k_img = RMSNorm(config.dim, config.eps)

    def forward(self, x: Tensor, text: Tensor, image: Tensor | None) -> Tensor:
        v = self.heads(self.v(text))
        q = self.heads(self.norm_q(self.q(x))).to(v.dtype)
        k = self.heads(self.norm_k(self.k(text))).to(v.dtype)
        out = attention(q, k, v, "text").float()
        if image is not None:
            k = self.heads(self.norm_k_img(self.k_img(image))).to(v.dtype)
            out = out + attention(q, k, self.heads(self.v_img(image)), "image").float()
        return self.o(out.reshape(x.shape))


class Block(nn.Module):
    """One transformer block on x [R, n, dim] fp32; with R > 1, row r has its own timestep."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.empty(1, 6, config.dim))
        self.norm1 = LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.self_attn = SelfAttention(config)
        self.norm3 = LayerNorm(config.dim, config.eps)
        self.cross_attn = CrossAttention(config)
        self.norm2 = LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.ffn = nn.Sequential(
            Linear(config.dim, config.ffn_dim),
            nn.GELU(approximate="tanh"),
            Linear(config.ffn_dim, config.dim),
        )

    def forward(self, x: Tensor, cond: Conditioning) -> Tensor:
        rows = self.modulation + cond.modulation
        attn, ffn = (
            Modulation(rows[:, i : i + 1], rows[:, i + 1 : i + 2], rows[:, i + 2 : i + 3])
            for i in (0, 3)
        )
        y = self.self_attn(self.norm1(x) * (1 + attn.scale) + attn.shift, cond.cos, cond.sin)
        x = x + y.float() * attn.gate
        x = x + self.cross_attn(self.norm3(x), cond.context, cond.image_context).float()
        y = self.ffn(self.norm2(x) * (1 + ffn.scale) + ffn.shift)
        return x + y.float() * ffn.gate


class Head(nn.Module):
    """The call `head`: modulated norm and projection to patches; all fp32."""

    def __init__(self, config: WanConfig, geometry: Geometry) -> None:
        super().__init__()
        self.geometry = geometry
        self.modulation = nn.Parameter(torch.empty(1, 2, config.dim))
        self.norm = LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.head = Linear(config.dim, PATCH * PATCH * config.out_channels)

    def forward(self, x: Tensor, time: Tensor) -> dict[str, Tensor]:
        rows = self.modulation + time[:, None]
        patches = self.head(self.norm(x) * (1 + rows[:, 1:2]) + rows[:, 0:1])
        return {"velocity": self.unpatchify(patches)}

    def unpatchify(self, patches: Tensor) -> Tensor:
        """[R, n, 4 * C] -> [1, C, F, h, w], the channel fastest."""
        f, r, c = self.geometry.grid
        pixels = patches.reshape(f, r, c, PATCH, PATCH, -1).permute(5, 0, 1, 3, 2, 4)
        return pixels.reshape(1, -1, f, r * PATCH, c * PATCH)


class ImageEmbedding(nn.Module):
    """CLIP features [1, 257 or 514, 1280] -> [1, 257 or 514, dim]; its LayerNorms have eps 1e-5."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            LayerNorm(IMAGE_DIM),
            Linear(IMAGE_DIM, IMAGE_DIM),
            nn.GELU(),
            Linear(IMAGE_DIM, config.dim),
            LayerNorm(config.dim),
        )
        if config.image_tokens == 514:
            self.emb_pos = nn.Parameter(torch.empty(1, 514, IMAGE_DIM))

    def forward(self, image: Tensor) -> Tensor:
        return self.proj(image + self.emb_pos if hasattr(self, "emb_pos") else image)


class PatchEmbedding(nn.Conv3d):
    """Patches that do not overlap: a matrix product on the flattened pixels of each, fp32 out."""

    def forward(self, patches: Tensor) -> Tensor:
        return F.linear(patches.to(self.weight.dtype), self.weight.flatten(1), self.bias).float()


class TimeFeatures(nn.Module):
    """cos and sin of t * 10000^(-i/half), as accurate in fp32 as the official code is in fp64.

    t * f reaches 1000 radians, where fp32 resolves only 6e-5. So t is split at its integer and f at
    13 bits: the product of the large parts is exact, and the angle-sum formulas add the small rest.
    """

    coarse: Tensor
    rest: Tensor
    full: Tensor

    def __init__(self, freq_dim: int) -> None:
        super().__init__()
        half = freq_dim // 2
        exact = 10000.0 ** -(torch.arange(half, dtype=torch.float64, device="cpu") / half)
        mantissa, exponent = torch.frexp(exact)
        coarse = torch.ldexp((mantissa * 2**13).round() / 2**13, exponent)
        self.register_buffer("coarse", coarse.float(), persistent=False)
        self.register_buffer("rest", (exact - coarse).float(), persistent=False)
        self.register_buffer("full", exact.float(), persistent=False)

    def forward(self, timestep: Tensor) -> Tensor:
        t = timestep[:, None]  # [R, 1]
        whole = t.round()
        large = whole * self.coarse
        small = whole * self.rest + (t - whole) * self.full
        cos = large.cos() * small.cos() - large.sin() * small.sin()
        sin = large.sin() * small.cos() + large.cos() * small.sin()
        return torch.cat([cos, sin], dim=-1)  # [R, freq_dim]


class WanModel(Graph):
    """The denoiser for one config, geometry and dtype: velocity of a latent at a timestep."""

    describe = staticmethod(program_of)
    rope_frames: Tensor
    rope_rows: Tensor
    rope_columns: Tensor

    def __init__(
        self, config: WanConfig, geometry: Geometry, dtype: torch.dtype, fused: bool = False
    ) -> None:
        super().__init__(config, geometry, dtype)
        dim, patch = config.dim, (1, PATCH, PATCH)
        self.patch_embedding = PatchEmbedding(config.in_channels, dim, patch, patch)
        self.text_embedding = nn.Sequential(
            Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), Linear(dim, dim)
        )
        self.time_features = TimeFeatures(config.freq_dim)
        self.time_embedding = nn.Sequential(
            Linear(config.freq_dim, dim), nn.SiLU(), Linear(dim, dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))
        if config.image_tokens:
            self.img_emb = ImageEmbedding(config)
        kind = _fused_block() if fused else Block
        self.blocks = nn.ModuleList(kind(config) for _ in range(config.num_layers))
        self.head = Head(config, geometry)
        axes = zip(("frames", "rows", "columns"), geometry.grid, axis_dims(config.head_dim))
        for name, length, axis_dim in axes:
            self.register_buffer(f"rope_{name}", axis_table(length, axis_dim), persistent=False)
        self.freeze()

    def patchify(self, latent: Tensor) -> Tensor:
        """[1, C, F, h, w] -> [L, C * 4], the channel slowest, as the Conv3d weight flattens."""
        f, r, c = self.geometry.grid
        patches = latent.reshape(-1, f, r, PATCH, c, PATCH).permute(1, 2, 4, 0, 3, 5)
        return patches.reshape(f * r * c, -1)

    def embed_time(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Timesteps [R] -> embedding [R, dim] and its six-fold projection [R, 6, dim], fp32."""
        time = self.time_embedding(self.time_features(timestep))
        return time, self.time_projection(time).reshape(-1, 6, self.config.dim)

    def embed(
        self,
        latent: Tensor,
        timestep: Tensor,
        text: Tensor,
        condition: Tensor | None = None,
        image: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Residual stream x [R, n, dim], time embedding [R, dim], and what the blocks are given."""
        if condition is not None:
            latent = torch.cat([latent, condition], dim=1)
        patches = self.patch_embedding(self.patchify(latent))
        x = patches.reshape(timestep.shape[0], -1, self.config.dim)
        time, modulation = self.embed_time(timestep)
        cos, sin = combine_axes(self.rope_frames, self.rope_rows, self.rope_columns)
        context = self.text_embedding(text)
        written = {"x": x, "time": time, "modulation": modulation, "context": context}
        written |= {"cos": cos, "sin": sin}
        return written if image is None else {**written, "image_context": self.img_emb(image)}

    def block(self, index: int, x: Tensor, **conditioning: Tensor) -> dict[str, Tensor]:
        """The residual stream after one layer; conditioning has the fields of Conditioning."""
        return {"x": self.blocks[index](x, Conditioning(**conditioning))}


def _fused_block() -> type[Block]:
    from wanexport.graphs.fused_block import FusedBlock  # needs Triton

    return FusedBlock
