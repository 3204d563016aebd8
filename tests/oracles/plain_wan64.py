"""Wan's T2V forward in fp64, written from the paper and the official code: an oracle of the tests.

It shares no code with the graph: patches by a convolution, rotations by complex numbers, attention
by a softmax. Wan-Video/Wan2.1 `wan/modules/model.py`.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, Tensor]  # by official name, in fp64


def as_fp64(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Arrays of any precision as tensors that are exact."""
    return {name: torch.from_numpy(np.asarray(array, np.float64)) for name, array in arrays.items()}


def patches(weights: Weights, name: str, video: Tensor) -> Tensor:
    """[1, C, F, h, w] -> [L, dim], by a convolution that steps over patches of 1 x 2 x 2."""
    weight = weights[f"{name}.weight"]
    weight = weight.reshape(weight.shape[0], video.shape[1], 1, 2, 2)
    found = F.conv3d(video, weight, weights[f"{name}.bias"], stride=(1, 2, 2))
    return found[0].flatten(1).T


def context(weights: Weights, text: Tensor, rows: int) -> Tensor:
    """Text embeddings [n, text_dim], zero-padded to some rows, as the blocks attend to them."""
    padded = F.pad(text, (0, 0, 0, rows - text.shape[0]))
    hidden = F.gelu(linear(weights, "text_embedding.0", padded), approximate="tanh")
    return linear(weights, "text_embedding.2", hidden)


def velocity(
    weights: Weights,
    x: Tensor,
    timestep: float,
    attended: Tensor,
    *,
    grid: tuple[int, int, int],
    heads: int,
    layers: int,
    before: Callable[[int, Tensor], Tensor] = lambda layer, x: x,
    after: Callable[[int, Tensor], None] = lambda layer, x: None,
) -> Tensor:
    """The velocity [1, C, F, h, w] of patches x [L, dim] at a timestep.

    before makes the input of each layer of what came to it, and after is told its output.
    """
    time, steering = _time(weights, timestep)
    turn = _rotation(grid, x.shape[-1] // heads)
    for layer in range(layers):
        x = before(layer, x)
        x = _block(weights, f"blocks.{layer}.", x, steering, attended, turn, heads)
        after(layer, x)
    shift, scale = weights["head.modulation"][0] + time
    out = linear(weights, "head.head", _normed(x) * (1 + scale) + shift)
    pixels = out.reshape(*grid, 2, 2, -1)
    frames, rows, columns = grid
    found = torch.einsum("frcyxk->kfrycx", pixels)
    return found.reshape(1, -1, frames, 2 * rows, 2 * columns)


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    """x W^T + b."""
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def _time(weights: Weights, timestep: float) -> tuple[Tensor, Tensor]:
    half = weights["time_embedding.0.weight"].shape[1] // 2
    angles = timestep * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    hidden = F.silu(linear(weights, "time_embedding.0", torch.cat([angles.cos(), angles.sin()])))
    time = linear(weights, "time_embedding.2", hidden)
    return time, linear(weights, "time_projection.1", F.silu(time)).reshape(6, -1)


def _rotation(grid: tuple[int, int, int], head_dim: int) -> Tensor:
    """A complex number of modulus 1 for each token and pair: [L, 1, head_dim / 2]."""
    side = 2 * (head_dim // 6)
    axes = []
    for axis, width in enumerate((head_dim - 2 * side, side, side)):
        speeds = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        angles = torch.arange(grid[axis], dtype=torch.float64)[:, None] * speeds
        shape = [1, 1, 1, -1]
        shape[axis] = grid[axis]
        axes.append(angles.reshape(shape).expand(*grid, -1))
    angles = torch.cat(axes, dim=-1).flatten(0, 2)
    return torch.polar(torch.ones_like(angles), angles)[:, None]


def _block(
    weights: Weights, name: str, x: Tensor, steering: Tensor, attended: Tensor, turn: Tensor,
    heads: int,
) -> Tensor:  # fmt: skip
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = weights[f"{name}modulation"][0] + steering
    y = _normed(x) * (1 + scale) + shift
    x = x + _attention(weights, f"{name}self_attn", y, y, turn, heads) * gate
    y = _normed(x) * weights[f"{name}norm3.weight"] + weights[f"{name}norm3.bias"]
    x = x + _attention(weights, f"{name}cross_attn", y, attended, None, heads)
    y = linear(weights, f"{name}ffn.0", _normed(x) * (1 + ffn_scale) + ffn_shift)
    return x + linear(weights, f"{name}ffn.2", F.gelu(y, approximate="tanh")) * ffn_gate


def _attention(
    weights: Weights, name: str, x: Tensor, attended: Tensor, turn: Tensor | None, heads: int
) -> Tensor:
    q = _rms(linear(weights, f"{name}.q", x), weights[f"{name}.norm_q.weight"])
    k = _rms(linear(weights, f"{name}.k", attended), weights[f"{name}.norm_k.weight"])
    q, k, v = (
        part.reshape(part.shape[0], heads, -1)
        for part in (q, k, linear(weights, f"{name}.v", attended))
    )
    if turn is not None:
        q, k = (_turned(part, turn) for part in (q, k))
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    out = torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), v)
    return linear(weights, f"{name}.o", out.flatten(1))


def _turned(x: Tensor, turn: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2)


def _normed(x: Tensor) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * weight
