"""LoRA files of random values for a whole model, as lightx2v's distilled ones are laid out."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]


def write_lora(
    path: Path,
    shapes: Shapes,
    seed: int,
    *,
    rank: int = 4,
    dtype: torch.dtype = torch.float32,
    size: float = 0.2,
) -> Path:
    """A low rank for every linear layer of a block, with alpha, and a difference of every bias.

    The products are about `size` of a weight.
    """
    rng = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        layer = f"diffusion_model.{name.rpartition('.')[0]}"
        if not name.startswith("blocks."):
            continue
        if name.endswith(".weight") and len(shape) == 2:
            scale = (size / (rank * shape[1])) ** 0.5
            down = torch.randn(rank, shape[1], generator=rng) * scale
            up = torch.randn(shape[0], rank, generator=rng) * scale**0.5
            tensors[f"{layer}.lora_down.weight"] = down.to(dtype)
            tensors[f"{layer}.lora_up.weight"] = up.to(dtype)
            tensors[f"{layer}.alpha"] = torch.tensor(float(rank))
        elif name.endswith(".bias"):
            difference = torch.randn(shape, generator=rng) * size / 10
            tensors[f"{layer}.diff_b"] = difference.to(dtype)
    save_file(tensors, path)
    return path
