"""Small checkpoints in the layouts of the programs that quantise, and the values they stand for.

Each writer returns the values, computed here in numpy apart from the product: q * scale in fp32.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

State = Mapping[str, Tensor]
LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0, torch.int8: 127.0}


class Quantised(NamedTuple):
    """Stored values, their scale, and what they stand for."""

    stored: Tensor
    scale: Tensor
    values: np.ndarray


def quantise(weight: Tensor, dtype: torch.dtype, scale_shape: tuple[int, ...]) -> Quantised:
    """A weight with one scale for each entry of the shape: none, rows, or blocks of rows."""
    array = weight.float().numpy()
    groups = scale_shape[1] if len(scale_shape) > 1 else 1
    rows = scale_shape[0] if scale_shape else 1
    blocks = array.reshape(rows, groups, -1)
    scale = (np.abs(blocks).max(axis=2, keepdims=True) / LARGEST[dtype]).astype(np.float32)
    ratio = torch.from_numpy(blocks / scale)
    stored = (ratio.round() if dtype == torch.int8 else ratio).to(dtype)
    values = stored.float().numpy() * scale
    return Quantised(
        stored.reshape(weight.shape),
        torch.from_numpy(scale).reshape(scale_shape),
        values.reshape(array.shape),
    )


def is_linear(name: str, weight: Tensor) -> bool:
    """Whether a parameter is the matrix of a linear layer."""
    return name.endswith(".weight") and weight.dim() == 2


def is_of_block(name: str, weight: Tensor) -> bool:
    """The same within the blocks, which are all that some programs quantise."""
    return is_linear(name, weight) and name.startswith("blocks.")


def write_scaled(
    path: Path,
    state: State,
    dtype: torch.dtype = torch.float8_e4m3fn,
    *,
    scale: Callable[[Tensor], tuple[int, ...]] = lambda weight: (),
    names: tuple[str, str] = ("scale_weight", "scale_input"),
    chosen: Callable[[str, Tensor], bool] = is_linear,
    rest: torch.dtype = torch.float16,
    prefix: str = "",
    extra: State | None = None,
    metadata: dict[str, str] | None = None,
) -> dict[str, np.ndarray]:
    """A file with a scale beside each chosen weight, and the values that it stands for."""
    tensors, values = dict(extra or {}), {}
    for name, weight in state.items():
        if not chosen(name, weight):
            tensors[prefix + name] = weight.to(rest)
            values[name] = weight.to(rest).float().numpy()
            continue
        made = quantise(weight, dtype, scale(weight))
        layer = prefix + name.removesuffix("weight")
        tensors |= {prefix + name: made.stored, layer + names[0]: made.scale}
        tensors[layer + names[1]] = torch.ones(())
        values[name] = made.values
    save_file({n: t.contiguous() for n, t in tensors.items()}, path, metadata)
    return values


def by_row(weight: Tensor) -> tuple[int, ...]:
    """The shape of a scale for each row, as LightX2V has it."""
    return (weight.shape[0], 1)


def by_block(weight: Tensor) -> tuple[int, ...]:
    """The shape of a scale for each 64 values of a row, as musubi has it."""
    return (weight.shape[0], weight.shape[1] // 64, 1)


def write_comfy(
    path: Path, state: State, *, is_tensor: bool, prefix: str = ""
) -> dict[str, np.ndarray]:
    """ComfyUI's newer layout: fp8, e5m2 and int8 in turn, told in tensors or in the header."""
    formats: list[tuple[str, torch.dtype, tuple[int, ...]]] = [
        ("float8_e4m3fn", torch.float8_e4m3fn, ()),
        ("float8_e5m2", torch.float8_e5m2, ()),
        ("int8_tensorwise", torch.int8, ()),
    ]
    tensors: dict[str, Tensor] = {}
    values: dict[str, np.ndarray] = {}
    layers = {}
    for count, (name, weight) in enumerate(sorted(state.items())):
        if not is_linear(name, weight):
            tensors[prefix + name] = weight.bfloat16()
            values[name] = weight.bfloat16().float().numpy()
            continue
        called, dtype, shape = formats[count % 3]
        if called == "int8_tensorwise" and count % 2:
            shape = (weight.shape[0],)
        made = quantise(weight, dtype, shape)
        layer = prefix + name.removesuffix(".weight")
        tensors |= {f"{layer}.weight": made.stored, f"{layer}.weight_scale": made.scale}
        values[name] = made.values
        text = {"format": called, "full_precision_matrix_mult": True}
        layers[layer] = text
        if is_tensor:
            told = np.frombuffer(json.dumps(text).encode(), np.uint8).copy()
            tensors[f"{layer}.comfy_quant"] = torch.from_numpy(told)
    header = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    save_file(tensors, path, None if is_tensor else header)
    return values
