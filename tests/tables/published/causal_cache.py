"""What a causal Wan denoiser keeps between forwards, and what its forward is told by the host."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from tests.tables.published.wan import HEAD_DIM

THETA, MAX_FRAMES = 10000.0, 1024


class Host(Enum):
    """Where a forward takes integers from."""

    READ = "before"
    PASSED = "pull request 51"
    HOISTED = "hoisted"


@dataclass(frozen=True)
class CausalSize:
    """A model, and the chunks of its video in tokens."""

    layers: int
    heads: int
    ffn_dim: int
    frames: int  # of a chunk
    rows: int
    columns: int
    dtype: torch.dtype
    text_len: int = 512
    chunks: int = 2

    @property
    def dim(self) -> int:
        """Channels of a token."""
        return self.heads * HEAD_DIM

    @property
    def chunk_tokens(self) -> int:
        """Tokens of a chunk."""
        return self.frames * self.rows * self.columns

    def __str__(self) -> str:
        return f"{self.layers} layers of {self.dim}, {self.chunk_tokens} tokens a chunk"


@dataclass
class Cache:
    """Keys and values of one layer, of the clip and of the text, and the indices beside them."""

    k: Tensor  # [1, clip tokens, heads, 128]
    v: Tensor
    text_k: Tensor  # [1, text_len, heads, 128]
    text_v: Tensor
    global_end: Tensor  # int64 [1] on the device, as those below
    local_end: Tensor
    is_init: Tensor  # int32 scalar


@dataclass(frozen=True)
class Known:
    """What a forward gets beside its tensors; an int is None where the code reads a tensor."""

    host: Host
    start: int  # the first token of the chunk
    limit: int  # how many cached tokens are attended to
    frame_tokens: int | None
    is_first: bool | None  # the first forward of the clip
    tokens: int | None = None


def new_caches(size: CausalSize, device: str) -> list[Cache]:
    """Empty caches of a clip."""
    clip = (1, size.chunks * size.chunk_tokens, size.heads, HEAD_DIM)
    text = (1, size.text_len, size.heads, HEAD_DIM)

    def zeros(shape: Sequence[int]) -> Tensor:
        return torch.zeros(shape, dtype=size.dtype, device=device)

    def index() -> Tensor:
        return torch.zeros(1, dtype=torch.long, device=device)

    return [
        Cache(
            zeros(clip), zeros(clip), zeros(text), zeros(text), index(), index(),
            torch.tensor(0, dtype=torch.int32, device=device),
        )
        for _ in range(size.layers)
    ]  # fmt: skip


def rope_table() -> Tensor:
    """Unit complex numbers [1024, 64] of every position: 22 pairs of frames, 21, 21."""

    def axis(dim: int) -> Tensor:
        exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
        angles = torch.outer(torch.arange(MAX_FRAMES, dtype=torch.float64), THETA**-exponents)
        return torch.polar(torch.ones_like(angles), angles)

    return torch.cat([axis(HEAD_DIM - 4 * (HEAD_DIM // 6)), *(2 * [axis(2 * (HEAD_DIM // 6))])], 1)


def rotate(x: Tensor, grids: list[list[int]], table: Tensor, start_frame: int) -> Tensor:
    """RoPE of x [B, n, heads, 128] whose first frame has this number; n may exceed the grid."""
    pairs = x.shape[3] // 2
    times, rows, columns = table.split([pairs - 2 * (pairs // 3), pairs // 3, pairs // 3], dim=1)
    out = []
    for sample, (f, h, w) in zip(x, grids, strict=True):
        count = f * h * w
        turned = torch.view_as_complex(sample[:count].double().unflatten(-1, (-1, 2)))
        angles = torch.cat(
            [
                times[start_frame : start_frame + f].view(f, 1, 1, -1).expand(f, h, w, -1),
                rows[:h].view(1, h, 1, -1).expand(f, h, w, -1),
                columns[:w].view(1, 1, w, -1).expand(f, h, w, -1),
            ],
            dim=-1,
        ).reshape(count, 1, -1)
        turned = torch.view_as_real(turned * angles).flatten(2)
        out.append(torch.cat([turned, sample[count:]]))
    return torch.stack(out).type_as(x)
