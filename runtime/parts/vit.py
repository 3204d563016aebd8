"""The image tower of CLIP's ViT-H/14 as Wan uses it, with parameters named as in the official code.

Query, key and value are three projections: the official code stacks their weights.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of an image tower."""

    image_size: int  # pixels of a side
    patch_size: int
    dim: int
    mlp_dim: int
    num_heads: int
    num_layers: int
    norm_eps: float

    def __post_init__(self) -> None:
        if not 0 < self.patch_size <= self.image_size or self.image_size % self.patch_size:
            raise ValueError(f"patches of {self.patch_size} do not fill {self.image_size} pixels")
        if not 0 < self.num_heads <= self.dim or self.dim % self.num_heads:
            raise ValueError(f"{self.num_heads} heads do not divide {self.dim} channels")
        if not self.num_layers or not 0 < self.norm_eps < 1:
            raise ValueError(
                f"{self.num_layers} layers and norms' epsilon {self.norm_eps}: expected a layer at "
                f"least, and an epsilon between 0 and 1"
            )

    @property
    def num_tokens(self) -> int:
        """Of an image: the class token and the patches."""
        return 1 + (self.image_size // self.patch_size) ** 2


class VisionTransformer(nn.Module):
    """Features [B, tokens, dim] that the last block but one gives for pixels [B, 3, side, side].

    The last block and `post_norm` are there because checkpoints have them.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        dim, patch = config.dim, config.patch_size
        self.cls_embedding = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embedding = nn.Parameter(torch.empty(1, config.num_tokens, dim))
        self.patch_embedding = nn.Conv2d(3, dim, patch, patch, bias=False)
        self.pre_norm = nn.LayerNorm(dim, config.norm_eps)
        self.transformer = nn.ModuleList(_Block(config) for _ in range(config.num_layers))
        self.post_norm = nn.LayerNorm(dim, config.norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_embedding.expand(len(pixels), -1, -1), patches], 1)
        x = self.pre_norm(x + self.pos_embedding)
        for block in self.transformer[:-1]:
            x = block(x)
        return x


class _Block(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        dim = config.dim
        self.norm1 = nn.LayerNorm(dim, config.norm_eps)
        self.attn = _Attention(dim, config.num_heads)
        self.norm2 = nn.LayerNorm(dim, config.norm_eps)
        self.mlp = nn.Sequential(
            nn.Linear(dim, config.mlp_dim), nn.GELU(), nn.Linear(config.mlp_dim, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.q, self.k, self.v)
        )  # [B, H, S, dim / H]
        return self.proj(
            functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        )
