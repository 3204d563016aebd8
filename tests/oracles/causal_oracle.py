"""Self-Forcing's denoiser in fp64 by its rules, chunk by chunk: an oracle of the tests.

It shares no code with the graph: the cache is a list of frames that rolls, rotations are complex
numbers, attention is a softmax. guandeh17/Self-Forcing, `wan/modules/causal_model.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.oracles import plain_wan64
from tests.oracles.plain_wan64 import Weights, linear


@dataclass
class Frame:
    """What a layer keeps of one latent frame: its number in the video, and [n, H, D] each."""

    number: int
    k: Tensor
    v: Tensor


@dataclass
class CausalOracle:
    """A video that is made frame after frame, of rows x columns tokens each.

    window is how many latent frames are kept, the sink among them, None for all; sink how many of
    the first never go; max_attention how many of the kept are read, the latest.
    """

    weights: Weights
    rows: int
    columns: int
    heads: int
    layers: int
    text: Tensor  # [n, text_dim]
    text_len: int
    window: int | None = None
    sink: int = 0
    max_attention: int | None = None
    cache: list[list[Frame]] = field(init=False)
    begun: int | None = None  # the first frame of the chunk that was last seen

    def __post_init__(self) -> None:
        self.cache = [[] for _ in range(self.layers)]
        self.context = plain_wan64.context(self.weights, self.text, self.text_len)

    def velocity(self, latent: Tensor, timesteps: Sequence[float], start: int) -> Tensor:
        """Of a chunk [16, f, h, w] that begins at frame `start`, whose K and V are kept."""
        frames = latent.shape[1]
        if self.begun != start:
            self._evict(frames)
            self.begun = start
        x = plain_wan64.patches(self.weights, "patch_embedding", latent[None])
        x = x.reshape(frames, self.rows * self.columns, -1)
        times = [self._time(t) for t in timesteps]
        steering = torch.stack([six for _, six in times])  # [f, 6, dim]
        for layer in range(self.layers):
            x = self._block(layer, x, steering, start)
        time = torch.stack([t for t, _ in times])
        rows = self.weights["head.modulation"] + time[:, None]
        out = linear(self.weights, "head.head", _normed(x) * (1 + rows[:, 1:]) + rows[:, :1])
        pixels = out.reshape(frames, self.rows, self.columns, 2, 2, -1)
        found = torch.einsum("frcyxk->kfrycx", pixels)
        return found.reshape(-1, frames, 2 * self.rows, 2 * self.columns)

    def _evict(self, frames: int) -> None:
        if self.window is None:
            return
        over = len(self.cache[0]) + frames - self.window
        if over > 0:
            for kept in self.cache:
                del kept[self.sink : self.sink + over]

    def _time(self, timestep: float) -> tuple[Tensor, Tensor]:
        half = self.weights["time_embedding.0.weight"].shape[1] // 2
        speeds = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        features = torch.cat([(timestep * speeds).cos(), (timestep * speeds).sin()])
        hidden = F.silu(linear(self.weights, "time_embedding.0", features))
        time = linear(self.weights, "time_embedding.2", hidden)
        six = linear(self.weights, "time_projection.1", F.silu(time)).reshape(6, -1)
        return time, six

    def _block(self, layer: int, x: Tensor, steering: Tensor, start: int) -> Tensor:
        name = f"blocks.{layer}."
        table = self.weights[f"{name}modulation"] + steering
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (table[:, i, None] for i in range(6))
        y = self._self_attention(layer, _normed(x) * (1 + scale) + shift, start)
        x = x + y * gate
        norm = f"{name}norm3"
        y = _normed(x) * self.weights[f"{norm}.weight"] + self.weights[f"{norm}.bias"]
        x = x + self._text_attention(f"{name}cross_attn", y)
        y = linear(self.weights, f"{name}ffn.0", _normed(x) * (1 + ffn_scale) + ffn_shift)
        return x + linear(self.weights, f"{name}ffn.2", F.gelu(y, approximate="tanh")) * ffn_gate

    def _self_attention(self, layer: int, x: Tensor, start: int) -> Tensor:
        name, kept = f"blocks.{layer}.self_attn", self.cache[layer]
        q, k = (self._normed_heads(f"{name}.{p}", f"{name}.norm_{p}", x) for p in "qk")
        v = linear(self.weights, f"{name}.v", x).unflatten(-1, (self.heads, -1))
        queries = []
        for i in range(x.shape[0]):
            turn = self._turn(start + i, q.shape[-1])
            queries.append(_turned(q[i], turn))
            own = Frame(start + i, _turned(k[i], turn), v[i])
            at = [n for n, frame in enumerate(kept) if frame.number == own.number]
            if at:
                kept[at[0]] = own
            else:
                kept.append(own)
        read = kept if self.max_attention is None else kept[-self.max_attention :]
        out = _softmax_attention(
            torch.cat(queries), torch.cat([f.k for f in read]), torch.cat([f.v for f in read])
        )
        return linear(self.weights, f"{name}.o", out.flatten(1)).reshape(x.shape)

    def _text_attention(self, name: str, x: Tensor) -> Tensor:
        q = self._normed_heads(f"{name}.q", f"{name}.norm_q", x.flatten(0, 1))
        k = self._normed_heads(f"{name}.k", f"{name}.norm_k", self.context)
        v = linear(self.weights, f"{name}.v", self.context).unflatten(-1, (self.heads, -1))
        out = _softmax_attention(q, k, v)
        return linear(self.weights, f"{name}.o", out.flatten(1)).reshape(x.shape)

    def _normed_heads(self, name: str, norm: str, x: Tensor) -> Tensor:
        y = linear(self.weights, name, x)
        y = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.weights[f"{norm}.weight"]
        return y.unflatten(-1, (self.heads, -1))

    def _turn(self, number: int, head_dim: int) -> Tensor:
        """A complex number of modulus 1 for each token of a frame and pair: [n, 1, D / 2]."""
        side = 2 * (head_dim // 6)
        numbers = (
            torch.full((self.rows, self.columns), number),
            torch.arange(self.rows)[:, None].expand(self.rows, self.columns),
            torch.arange(self.columns).expand(self.rows, self.columns),
        )
        angles = []
        for places, width in zip(numbers, (head_dim - 2 * side, side, side)):
            speeds = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
            angles.append(places.flatten()[:, None].double() * speeds)
        turns = torch.cat(angles, dim=1)
        return torch.polar(torch.ones_like(turns), turns)[:, None]


def _turned(x: Tensor, turn: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2)


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), v)


def _normed(x: Tensor) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
