"""A checkpoint of Wan's VAE, in the official layout or diffusers', as a source of weights.

The official file is Wan2.1_VAE.pth or Wan2.2_VAE.pth, or the same tensors as safetensors; diffusers
keeps a folder. The file that engines read has diffusers' names, and kernels with the input channels
last.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wanexport.graphs.foreign import file_format
from wanexport.graphs.json_file import read_object
from wanexport.graphs.source_tensor import SourceTensor
from wanexport.graphs.torch_file import read_torch_file
from wanexport.graphs.weights import CheckpointWeights, read_tensor
from wanexport.runtime.bundle.tensorfile import read_header
from wanexport.runtime.dtypes import DTYPES, PRECISIONS
from wanexport.runtime.errors import BadRequest, printable
from wanexport.runtime.key_tables import required
from wanexport.runtime.parts.vae_keys import diffusers_name, latent_statistics
from wanexport.runtime.vae_config import VaeConfig
from wanexport.runtime.wan_vae import STATISTICS, parameter_shapes

_FLOATS = [DTYPES[name].stored for name in PRECISIONS]
_FILES = ("diffusion_pytorch_model*.safetensors", "diffusion_pytorch_model*.bin")
_RESIDUAL_ONLY = "encoder.down_blocks.0.resnets.0.conv1.weight"
_SHOWN = 4  # of the tensors that do not fit, in an error
_STRUCTURE = {  # of every VAE of Wan, as a config.json of diffusers may state it
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
}


@dataclass(frozen=True)
class VaeCheckpoint:
    """The sizes of a VAE, its tensors by diffusers' names, and the statistics of its latents."""

    path: Path
    layout: str  # official or diffusers
    config: VaeConfig
    tensors: dict[str, SourceTensor]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]


def open_vae_checkpoint(path: Path) -> VaeCheckpoint:
    """Open a file, or a folder in diffusers' layout; no weights are read yet.

    Raises WanExportError when there is no VAE of Wan in it, or it is damaged.
    """
    stated = _stated(path) if path.is_dir() else {}
    found: dict[str, SourceTensor] = {}
    for file in _files(path):
        found |= _read(file)
    layout = "official" if "encoder.conv1.weight" in found else "diffusers"
    named = {diffusers_name(n) if layout == "official" else n: t for n, t in found.items()}
    config = _recognise({name: t.entry.shape for name, t in named.items()}, path)
    _check_tensors(named, config, path)
    mean, deviation = _statistics(stated, config.channels, path)
    return VaeCheckpoint(path, layout, config, named, mean, deviation)


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    for pattern in _FILES:
        if files := sorted(path.glob(pattern)):
            return files
    raise BadRequest(
        f"{printable(path)} has no {_FILES[0]}: name a folder in diffusers' layout, or the file "
        f"Wan2.1_VAE.pth or Wan2.2_VAE.pth"
    )


def _read(file: Path) -> dict[str, SourceTensor]:
    kind = file_format(file)
    if kind == "torch":
        return read_torch_file(file).tensors
    if kind == "safetensors":
        return {name: SourceTensor(file, entry, name) for name, entry in read_header(file).items()}
    raise BadRequest(f"{printable(file)} is a {kind} file, in which no VAE is read: name a .pth")


def _stated(folder: Path) -> dict[str, Any]:
    """The config.json. Raises BadRequest when it is missing, or of another model than Wan's VAE."""
    stated = read_object(folder / "config.json")
    name = stated.get("_class_name", "nothing")
    if name != "AutoencoderKLWan":
        raise BadRequest(
            f"{printable(folder)}/config.json is of {printable(name, 60)}: expected "
            f"AutoencoderKLWan, Wan's VAE"
        )
    for key, expected in _STRUCTURE.items():
        if stated.get(key, expected) != expected:
            raise BadRequest(
                f"{printable(folder)}/config.json has {key} {printable(stated[key], 60)}: every "
                f"VAE of Wan has {expected}"
            )
    return stated


def _recognise(shapes: Mapping[str, tuple[int, ...]], path: Path) -> VaeConfig:
    what = f"{printable(path)} is no VAE of Wan"
    shape = required(
        shapes, what, "Wan2.1_VAE.pth, Wan2.2_VAE.pth or diffusers' folder", BadRequest
    )
    return VaeConfig(
        channels=shape("post_quant_conv.weight", 5)[0],
        encoder_dim=shape("encoder.conv_in.weight", 5)[0],
        decoder_dim=shape("decoder.conv_out.weight", 5)[1],
        is_residual=_RESIDUAL_ONLY in shapes,
    )


def _check_tensors(tensors: Mapping[str, SourceTensor], config: VaeConfig, path: Path) -> None:
    expected = {n: s for n, s in parameter_shapes(config).items() if n not in STATISTICS}
    problems = [f"missing {name}" for name in sorted(expected.keys() - tensors.keys())]
    problems += [f"unexpected {printable(n)}" for n in sorted(tensors.keys() - expected.keys())]
    for name in sorted(expected.keys() & tensors.keys()):
        entry = tensors[name].entry
        if _stored_shape(entry.shape, len(expected[name])) != expected[name]:
            problems.append(f"{name} is {list(entry.shape)}")
        elif entry.dtype not in _FLOATS:
            problems.append(f"{name} is {entry.dtype}, expected {', '.join(_FLOATS)}")
    if problems:
        more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise BadRequest(
            f"{printable(path)} does not fit a VAE of Wan: {'; '.join(problems[:_SHOWN])}{more}: "
            f"download it again"
        )


def _stored_shape(shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """The shape that a tensor of a checkpoint has in the weights file, where its rank is given.

    A kernel over height and width alone gets a time of one; a kernel of one place becomes a matrix,
    and a column of one number for each channel a list.
    """
    if rank == 1 or len(shape) < 2:
        return tuple(size for size in shape if size > 1) or shape[:1]
    out, inner, *places = shape
    if rank == 2:
        return (out, inner, *(size for size in places if size > 1))
    return (out, *(1,) * (rank - len(shape)), *places, inner)


def _statistics(
    stated: Mapping[str, Any], channels: int, path: Path
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel, stated or those of the VAE with so many channels."""
    names = ("latents_mean", "latents_std")
    if not any(name in stated for name in names):
        return latent_statistics(channels, path, BadRequest)
    mean, deviation = (_numbers(stated.get(name)) for name in names)
    if len(mean) != channels or len(deviation) != channels:
        raise BadRequest(
            f"{printable(path)}/config.json has no latents_mean and latents_std of {channels} "
            f"numbers each: download it again"
        )
    if 0 in deviation:
        raise BadRequest(f"{printable(path)}/config.json has a latents_std of 0: download it again")
    return mean, deviation


def _numbers(row: object) -> tuple[float, ...]:
    """The finite numbers of a list; none of what is no list of them."""
    is_list = isinstance(row, list) and all(type(v) in (int, float) and isfinite(v) for v in row)
    return tuple(map(float, row)) if is_list and isinstance(row, list) else ()


class VaeWeights:
    """A source of the parameters of a VAE, as `write_tensors` takes one."""

    def __init__(self, checkpoint: VaeCheckpoint) -> None:
        self.shapes = parameter_shapes(checkpoint.config)
        self.tensors = checkpoint.tensors
        mean, deviation = (torch.tensor(row) for row in (checkpoint.mean, checkpoint.deviation))
        # As in the official code, which multiplies by the reciprocal and divides by that again.
        self.statistics = dict(zip(STATISTICS, (mean, 1 / deviation)))

    def chunks(self, name: str) -> Iterator[Tensor]:
        """The parameter's elements in order, in one piece."""
        if name in self.statistics:
            yield self.statistics[name]
            return
        tensor = read_tensor(self.tensors[name])
        if tensor.ndim > 2 and len(self.shapes[name]) > 1:
            tensor = tensor.movedim(1, -1)
        yield tensor.reshape(-1)

    def digest(self) -> str:
        """A hash of the checkpoint's tensors and of the latents' statistics."""
        numbers = {name: values.tolist() for name, values in self.statistics.items()}
        parts = [CheckpointWeights(self.tensors).digest(), numbers]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def with_chunks(config: VaeConfig, *, decode: int, encode: int, tf32: bool) -> VaeConfig:
    """The sizes of a checkpoint with how its engine is cut, and whether it may take TF32."""
    return replace(config, decode_chunk=decode, encode_chunk=encode, tf32=tf32)
