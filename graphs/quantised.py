"""Pair the quantised tensors of a checkpoint with their scales, and say what is quantised how.

The formats that are read all mean w = q * scale, with a scale for each tensor, row or block of a
row; a GGUF file's blocks hold their own. docs/checkpoints.md has the table. The others are refused
by name. The writers, whose names and shapes these are: ComfyUI (`comfy/quant_ops.py`, and
`convert_old_quants` in `comfy/utils.py`), LightX2V, musubi-tuner, ModelOpt.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from wanexport.graphs.source_tensor import FLOATS, SCALED, Scale, SourceTensor, read_values
from wanexport.runtime.dtypes import STORED
from wanexport.runtime.errors import BadRequest, printable

METADATA = "_quantization_metadata"  # of ComfyUI, in a safetensors header
_MARKER = "scaled_fp8"  # of ComfyUI's older files
_CONFIG = ".comfy_quant"
_MAX_CONFIG = 4096  # bytes: a layer's takes 100
_SCALES = (".scale_weight", ".weight_scale")
_INPUT_SCALES = (".scale_input", ".input_scale")  # of activations, which engines do not quantise
_FORMATS = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "int8_tensorwise": "I8"}
_TAKE = "take the fp32, bf16, fp16, scaled fp8 or GGUF file of the same model"

# What of a tensor's name tells a format that is not read -> what the format is called.
_UNREAD_NAMES = (
    (r"\.weight_scale_2$", "nvfp4"),
    (r"\.(_data|_scale)$", "int8 or fp8 (quanto)"),
    (r"\.(absmax|quant_map|quant_state\b.*)$", "4 or 8 bits (bitsandbytes)"),
    (r"\.(wscales|smooth|smooth_factor|proj_down|proj_up|lora_down|lora_up)$", "nunchaku"),
    (r"\.(qweight|qzeros|g_idx)$", "4 bits (nunchaku, AWQ or GPTQ)"),
    (r"\.(weight_s_rel|weight_s_channel|weight_codebook)$", "int8 of 4 bits (asym_w4a8_int8)"),
    (r"\.pre_quant_scale$", "a format with pre_quant_scale (AWQ)"),
    (r"\.weight_scale_inv$", "fp8 in square blocks (weight_scale_inv)"),
    (r"\.(int8_weight|weight_zero_point|zero_point)$", "int8 (another format)"),
)
_UNREAD_DTYPES = {
    "F8_E4M3FNUZ": "fp8 (e4m3fnuz)",
    "F8_E5M2FNUZ": "fp8 (e5m2fnuz)",
    "F8_E8M0": "mxfp8",
    "F6_E2M3": "fp6",
    "F6_E3M2": "fp6",
    "F4": "fp4",
    "U8": "4 bits",
}
_CALLED = {"F8_E4M3": "fp8 e4m3", "F8_E5M2": "fp8 e5m2", "I8": "int8"}


def with_scales(
    tensors: Mapping[str, SourceTensor], metadata: Iterable[Any], path: Path
) -> dict[str, SourceTensor]:
    """The tensors without what only describes them, and each quantised one with its scale.

    metadata is METADATA of each file's header. A scale that belongs to nothing stays, as a tensor
    that nobody expects. Raises BadRequest, naming the format, for one that is not read, and for a
    scale that is missing or of no shape that fits.
    """
    _refuse_unread(tensors, path)
    layers = dict(_layers(tensors, metadata, path))
    _check_layers(layers, tensors, path)
    _refuse_unread_dtypes(tensors, path)
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if not (name == _MARKER or name.endswith(_CONFIG) or _describes(name, tensors))
    }
    found = {
        name: scaled for name, t in kept.items() if (scaled := _scaled(name, t, tensors, path))
    }
    _check_all_scaled(kept, found, _MARKER in tensors or bool(layers), path)
    return {name: found.get(name, tensor) for name, tensor in kept.items()}


def _refuse_unread(tensors: Mapping[str, SourceTensor], path: Path) -> None:
    """Refuse formats that the names of their tensors tell."""
    for pattern, called in _UNREAD_NAMES:
        compiled = re.compile(pattern)
        if any(map(compiled.search, tensors)):
            raise _unread(path, called)


def _refuse_unread_dtypes(tensors: Mapping[str, SourceTensor], path: Path) -> None:
    """Refuse formats that dtypes tell: of weights, and of their scales."""
    for name, tensor in tensors.items():
        dtype = tensor.entry.dtype
        if name.endswith(_SCALES) and dtype in ("U8", "F8_E8M0"):
            raise _unread(path, "mxfp8")
        if name.endswith((_CONFIG, _MARKER)):
            continue
        if called := _UNREAD_DTYPES.get(dtype):
            raise _unread(path, called)


def _unread(path: Path, called: str) -> BadRequest:
    return BadRequest(
        f"{printable(path)} is quantised to {printable(called)}, which is not read: {_TAKE}"
    )


def _layers(
    tensors: Mapping[str, SourceTensor], metadata: Iterable[Any], path: Path
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """What ComfyUI's files say of each quantised layer, in headers and in tensors beside it."""
    for text in metadata:
        stated = _parsed(text, f"{METADATA} of its header", path).get("layers", {})
        if not isinstance(stated, dict) or not all(isinstance(v, dict) for v in stated.values()):
            raise BadRequest(
                f"{printable(path)} has layers that are none in {METADATA}: download it again"
            )
        yield from stated.items()
    for name, tensor in tensors.items():
        if name.endswith(_CONFIG):
            if tensor.entry.dtype != "U8" or tensor.entry.size > _MAX_CONFIG:
                raise BadRequest(
                    f"{printable(name)} of {printable(path)} is no JSON text: download it again"
                )
            yield name.removesuffix(_CONFIG), _parsed(_bytes_of(tensor), printable(name), path)


def _bytes_of(tensor: SourceTensor) -> bytes:
    """What a small tensor of bytes holds."""
    return read_values(tensor).to(torch.uint8).numpy().tobytes()


def _parsed(text: Any, what: str, path: Path) -> dict[str, Any]:
    try:
        stated = json.loads(text)
        if isinstance(stated, dict):
            return stated
        raise ValueError("it is no object")
    except (ValueError, TypeError, RecursionError) as error:
        raise BadRequest(
            f"{what} in {printable(path)} cannot be read ({printable(error)}): download it again"
        ) from error


def _check_layers(
    layers: Mapping[str, Mapping[str, Any]], tensors: Mapping[str, SourceTensor], path: Path
) -> None:
    """Refuse a layer's format that is not read, and one that its weight does not have."""
    for layer, stated in layers.items():
        called = str(stated.get("format"))
        if _says(stated, "convrot"):
            raise _unread(path, f"{called} with convrot")
        if called not in _FORMATS:
            raise _unread(path, called)
        weight = next((t for name in _weight_names(layer) if (t := tensors.get(name))), None)
        if weight is None or weight.entry.dtype != _FORMATS[called]:
            has = f"is {weight.entry.dtype}" if weight else "is not there"
            raise BadRequest(
                f"{printable(path)} says that {printable(layer)} is {called}, but its weight "
                f"{has}: download it again"
            )


def _weight_names(layer: str) -> Iterator[str]:
    """The names that a layer's weight may have: ComfyUI writes layers with and without a prefix."""
    parts = layer.split(".")
    return (".".join([*parts[k:], "weight"]) for k in range(min(len(parts), 4)))


def _says(stated: Any, flag: str, depth: int = 0) -> bool:
    """Whether an object or one within it has the flag set."""
    if not isinstance(stated, dict) or depth > 4:
        return False
    inner = any(_says(value, flag, depth + 1) for value in stated.values())
    return bool(stated.get(flag)) or inner


def _describes(name: str, tensors: Mapping[str, SourceTensor]) -> bool:
    """Whether a tensor is a scale of a quantised weight that is there."""
    for suffix in (*_SCALES, *_INPUT_SCALES):
        if name.endswith(suffix):
            weight = tensors.get(f"{name.removesuffix(suffix)}.weight")
            return weight is not None and weight.entry.dtype in SCALED
    return False


def _scaled(
    name: str, tensor: SourceTensor, tensors: Mapping[str, SourceTensor], path: Path
) -> SourceTensor | None:
    """A quantised tensor with its scale; None where it has none."""
    layer = name.removesuffix(".weight")
    scales = [tensors[layer + suffix] for suffix in _SCALES if layer + suffix in tensors]
    if tensor.entry.dtype not in SCALED or layer == name or not scales:
        return None
    if len(scales) > 1:
        raise BadRequest(
            f"{printable(name)} of {printable(path)} has two scales, {scales[0].name} and "
            f"{scales[1].name}: download it again"
        )
    return replace(tensor, scale=_scale(name, scales[0], tensor.entry.shape, path))


def _scale(name: str, scale: SourceTensor, shape: tuple[int, ...], path: Path) -> Scale:
    """How a scale applies to a weight [rows, columns]: to all of it, a row, or a block of a row."""
    given = scale.entry.shape
    if scale.entry.dtype not in FLOATS:
        raise _unread(path, f"a format with scales of {scale.entry.dtype}")
    if prod(given) == 1:
        return Scale(scale, 1, 1)
    rows, groups = (given[0], prod(given[1:])) if given else (0, 0)
    fits = len(shape) == 2 and rows == shape[0] and groups > 0 and shape[1] % groups == 0
    if not fits or (len(given) == 3 and given[2] != 1) or len(given) > 3:
        raise BadRequest(
            f"{printable(scale.name)} of {printable(path)} is {list(given)}, the weight "
            f"{printable(name)} {list(shape)}: expected one scale, one a row, or one a block of a "
            f"row; download it again"
        )
    return Scale(scale, rows, groups)


def _check_all_scaled(
    kept: Mapping[str, SourceTensor],
    found: Mapping[str, SourceTensor],
    is_marked: bool,
    path: Path,
) -> None:
    """Refuse a quantised tensor without a scale: of int8, and of fp8 where others have one."""
    for name, tensor in kept.items():
        if name in found or tensor.entry.dtype not in SCALED:
            continue
        if tensor.entry.dtype == "I8" or found or is_marked:
            raise BadRequest(
                f"{printable(name)} of {printable(path)} is {_CALLED[tensor.entry.dtype]} without "
                f"its scale: expected {printable(name.removesuffix('.weight'))}.weight_scale or "
                f".scale_weight; download it again"
            )


def describe_stored(tensors: Iterable[SourceTensor]) -> str:
    """What of a checkpoint is quantised, in words; empty when nothing is.

    As `fp8 e4m3, one scale a tensor, 400 tensors; F16, 120 tensors`, the most first.
    """
    tensors = list(tensors)
    if not any(tensor.is_quantised for tensor in tensors):
        return ""
    counts = Counter(map(_kind, tensors))
    return "; ".join(
        f"{kind}, {count} tensor{'s' * (count > 1)}" for kind, count in counts.most_common()
    )


def _kind(tensor: SourceTensor) -> str:
    dtype = tensor.entry.dtype
    if dtype not in STORED:
        return f"GGUF {dtype}"
    called, scale = _CALLED.get(dtype, dtype), tensor.scale
    if dtype not in SCALED:
        return called
    if scale is None:
        return f"{called}, no scales"
    if scale.groups > 1:
        return f"{called}, one scale a block of {tensor.entry.shape[1] // scale.groups}"
    return f"{called}, one scale a {'row' if scale.rows > 1 else 'tensor'}"
