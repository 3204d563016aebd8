"""umT5's encoder as Wan's official T5 code computes it, with parameters of its names.

Each block has position biases of its own, scores are not scaled, norms and softmax compute in fp32.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class UMT5Config:
    """Sizes of an encoder."""

    vocab_size: int
    dim: int
    num_heads: int
    head_dim: int
    ffn_dim: int
    num_layers: int
    num_buckets: int  # of relative positions, of both signs
    max_distance: int  # from which on all positions share a bucket
    norm_eps: float

    def __post_init__(self) -> None:
        exact = self.num_buckets // 4
        if not 0 < exact < self.max_distance:
            raise ValueError(
                f"{self.num_buckets} buckets of positions for distances below {self.max_distance}: "
                f"expected 4 or more buckets, and a distance over a quarter of them"
            )
        if not self.num_layers or not 0 < self.norm_eps < 1:
            raise ValueError(
                f"{self.num_layers} layers and norms' epsilon {self.norm_eps}: expected a layer at "
                f"least, and an epsilon between 0 and 1"
            )


class UMT5Encoder(nn.Module):
    """Embeddings [B, S, dim] of token ids [B, S]; every token attends to all of its row."""

    def __init__(self, config: UMT5Config) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = _Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.num_layers))
        self.norm = _RMSNorm(config.dim, config.norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token_embedding(ids)
        buckets = _buckets(ids.shape[1], self.config, ids.device)
        for block in self.blocks:
            x = block(x, buckets)
        return self.norm(x)


class _Embedding(nn.Module):
    """PyTorch's own fills its weight, for which the meta device imports a compiler."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dim))

    def forward(self, places: Tensor) -> Tensor:
        return functional.embedding(places, self.weight)


class _Block(nn.Module):
    def __init__(self, config: UMT5Config) -> None:
        super().__init__()
        self.norm1 = _RMSNorm(config.dim, config.norm_eps)
        self.attn = _Attention(config)
        self.norm2 = _RMSNorm(config.dim, config.norm_eps)
        self.ffn = _FeedForward(config)
        self.pos_embedding = _PositionBias(config)

    def forward(self, x: Tensor, buckets: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), self.pos_embedding(buckets))
        return x + self.ffn(self.norm2(x))


class _RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normed = x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(self.weight.dtype)


class _Attention(nn.Module):
    def __init__(self, config: UMT5Config) -> None:
        super().__init__()
        inner = config.num_heads * config.head_dim
        self.head_dim = config.head_dim
        self.q = nn.Linear(config.dim, inner, bias=False)
        self.k = nn.Linear(config.dim, inner, bias=False)
        self.v = nn.Linear(config.dim, inner, bias=False)
        self.o = nn.Linear(inner, config.dim, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (self._heads(project(x)) for project in (self.q, self.k, self.v))
        scores = q @ k.transpose(2, 3) + bias
        weights = scores.float().softmax(-1).to(scores.dtype)  # PyTorch's in bf16 rounds otherwise
        return self.o((weights @ v).transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, self.head_dim)).transpose(1, 2)  # [B, H, S, head_dim]


class _FeedForward(nn.Module):
    def __init__(self, config: UMT5Config) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(config.dim, config.ffn_dim, bias=False), _GELU())
        self.fc1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.fc2 = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.gate(x) * self.fc1(x))


class _GELU(nn.Module):
    """The tanh form, each step rounded to x's dtype: PyTorch's own rounds once."""

    def forward(self, x: Tensor) -> Tensor:
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
        return 0.5 * x * (1.0 + torch.tanh(inner))


class _PositionBias(nn.Module):
    def __init__(self, config: UMT5Config) -> None:
        super().__init__()
        self.embedding = _Embedding(config.num_buckets, config.num_heads)

    def forward(self, buckets: Tensor) -> Tensor:
        return self.embedding(buckets).permute(2, 0, 1)[None]  # [1, H, S, S]


def _buckets(length: int, config: UMT5Config, device: torch.device) -> Tensor:
    """The bucket [S, S] of each key's position relative to each query's.

    A half is for each sign. Of it, a half is for single distances, and the rest grows with their
    logarithm.
    """
    places = torch.arange(length, device=device)
    relative = places[None, :] - places[:, None]
    half = config.num_buckets // 2
    exact, distance = half // 2, relative.abs()
    growth = torch.log(distance.float() / exact) / math.log(config.max_distance / exact)
    far = exact + (growth * (half - exact)).long()
    near = torch.where(distance < exact, distance, far.clamp(max=half - 1))
    return (relative > 0).long() * half + near
