"""A Wan of tiny sizes, its weights, and LoRA files for it, as other programs write them."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from wanexport.graphs.config import PRESETS
from wanexport.runtime.bundle.signature import parameter_shapes
from wanexport.runtime.lora.merge import LoraStack

SIZES: dict[str, Any] = dict(dim=16, ffn_dim=24, num_heads=2, num_layers=2, text_dim=10, freq_dim=6)
CONFIG = replace(PRESETS["t2v-1.3b"].config, **SIZES)
IMAGE_CONFIG = replace(PRESETS["i2v-14b"].config, **SIZES)
SHAPES = parameter_shapes(CONFIG)
Q = "blocks.0.self_attn.q"
FFN = "blocks.1.ffn.0"


def random(*shape: int, seed: int = 0) -> Tensor:
    """Normal values, which shape and seed decide."""
    generator = torch.Generator().manual_seed(1000 * seed + sum(shape))
    return torch.randn(shape, generator=generator)


def base(name: str) -> Tensor:
    """A parameter's weight before any LoRA."""
    return random(*SHAPES[name], seed=len(name))


def pair(
    module: str, rank: int = 4, seed: int = 1, down: str = "lora_A", up: str = "lora_B"
) -> Any:
    """The two factors of a low rank for a module."""
    out, *columns = SHAPES[f"{module}.weight"]
    return {
        f"{module}.{down}.weight": random(rank, *columns, seed=seed),
        f"{module}.{up}.weight": random(out, rank, *[1] * (len(columns) - 1), seed=seed + 1),
    }


def write(folder: Path, tensors: Mapping[str, Tensor], **metadata: Any) -> Path:
    """A LoRA file; metadata is written as JSON."""
    file = folder / f"lora{len(list(folder.iterdir()))}.safetensors"
    header = {key: json.dumps(value) for key, value in metadata.items()}
    save_file({key: value.clone() for key, value in tensors.items()}, file, header or None)
    return file


def stack(
    folder: Path, tensors: Mapping[str, Tensor], strength: float = 1.0, **options: Any
) -> Any:
    """One LoRA of these tensors."""
    partial = options.pop("partial", False)
    return LoraStack([(write(folder, tensors, **options), strength)], SHAPES, partial=partial)


def merged(folder: Path, name: str, tensors: Mapping[str, Tensor], **options: Any) -> Tensor:
    """The parameter with one LoRA merged."""
    return stack(folder, tensors, **options).merge(name, base(name))


def wide(tensor: Tensor) -> Any:
    """fp64, for the oracle."""
    return tensor.double().numpy()


def is_close(found: Tensor, expected: Any, at_most: float = 1e-6) -> bool:
    """Whether fp32 values are those of an fp64 oracle."""
    assert found.dtype == torch.float32 and found.shape == expected.shape
    return bool(np.abs(wide(found) - expected).max() <= at_most * np.abs(expected).max())
