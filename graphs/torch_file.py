"""The tensors of a model that torch.save wrote: `.pt`, `.pth`, `.ckpt` and `.bin` files.

Only tensors are unpickled, so a file can execute nothing, and they stay mapped: each takes memory
where it is read.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from wanexport.graphs.source_tensor import SourceTensor
from wanexport.runtime.bundle.tensorfile import TensorEntry
from wanexport.runtime.dtypes import STORED
from wanexport.runtime.errors import BadRequest, printable
from wanexport.runtime.parts.torch_checkpoint import load_saved

# Under which of its keys a training's file has the model. Self-Forcing samples from the average.
_GENERATORS = ("generator_ema", "generator")
_MODELS = (*_GENERATORS, "state_dict", "model", "module")
_DEEPEST = 3  # of these keys, one in another's value: a dictionary may hold itself
_NAMES = {getattr(torch, row.torch): stored for stored, row in STORED.items() if row.torch}


class TorchFile(NamedTuple):
    """The tensors of a model by the names that its file has, and whether it is a causal Wan's.

    Self-Forcing and its relatives save the model that they train as a `generator`.
    """

    tensors: dict[str, SourceTensor]
    is_causal: bool


def read_torch_file(path: Path) -> TorchFile:
    """The model of a file.

    Of one with `generator` and `generator_ema`, as Self-Forcing's, it is the latter. Raises
    BundleError as `load_saved` does, and BadRequest when there is no model in the file, tensors
    overlap, or one is not dense and on the CPU.
    """
    saved = load_saved(path)
    tensors = _find_model(saved)
    if not tensors:
        raise BadRequest(
            f"{printable(path)} has no model: expected tensors by name, or these under one of "
            f"{', '.join(_MODELS)}"
        )
    for name, tensor in tensors.items():
        if fault := _fault(tensor):
            raise BadRequest(
                f"{printable(name)} of {printable(path)} {fault}: save its tensors anew, each "
                f"contiguous"
            )
    _check_apart(tensors, path)
    named = {name: SourceTensor(path, _entry(t), name, mapped=t) for name, t in tensors.items()}
    is_causal = any(isinstance(saved.get(key), dict) for key in _GENERATORS)
    return TorchFile(named, is_causal)


def _find_model(saved: object, depth: int = 0) -> dict[str, Tensor]:
    """The tensors by name; empty when there are none."""
    if not isinstance(saved, dict) or depth > _DEEPEST:
        return {}
    for key in _MODELS:
        if isinstance(saved.get(key), dict):
            return _find_model(saved[key], depth + 1)
    named = {str(name): t for name, t in saved.items() if isinstance(t, Tensor)}
    return named if len(named) == len(saved) else {}


def _fault(tensor: Tensor) -> str:
    """What keeps a tensor from being read; empty when nothing."""
    if tensor.layout is not torch.strided or tensor.device.type != "cpu":
        return f"is a {tensor.layout} tensor on {tensor.device}"
    if tensor.dtype not in _NAMES:
        return f"is of {tensor.dtype}, which is not read"
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return "" if tensor.permute(order).is_contiguous() else "repeats or leaves out stored values"


def _entry(tensor: Tensor) -> TensorEntry:
    return TensorEntry(_NAMES[tensor.dtype], tuple(tensor.shape), 0, tensor.nbytes)


def _check_apart(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise BadRequest when two tensors share stored values."""
    end, before = 0, ""
    for begin, size, name in sorted(_spans(tensors)):
        if begin < end:
            raise BadRequest(
                f"{printable(path)} has {printable(before)} and {printable(name)} in one place: "
                f"save its tensors anew, each by itself"
            )
        end, before = begin + size, name


def _spans(tensors: Mapping[str, Tensor]) -> Iterator[tuple[int, int, str]]:
    """Address, bytes and name of each tensor that has any."""
    for name, tensor in tensors.items():
        if tensor.nbytes:
            yield tensor.data_ptr(), tensor.nbytes, name
