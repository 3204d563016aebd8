"""The tensors of a model that torch.save wrote: `.pt`, `.pth`, `.ckpt` and `.bin` files.

Only tensors are unpickled, so a file can execute nothing, and they stay mapped: each takes memory
where it is read.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from wanexport.graphs.source_tensor import SourceTensor
from wanexport.runtime.bundle.tensorfile import TensorEntry
from wanexport.runtime.dtypes import STORED
from wanexport.runtime.errors import BadRequest, printable
from wanexport.runtime.parts.torch_checkpoint import load_saved

# Under which of its keys a training's file has the model. Self-Forcing's authors sample from the
# average.
EMA = "generator_ema"
GENERATORS = {True: EMA, False: "generator"}  # by whether it is the average
_OTHERS = ("state_dict", "model", "module")
_MODELS = (*GENERATORS.values(), *_OTHERS)
_DEEPEST = 3  # of these keys, one in another's value: a dictionary may hold itself
_NAMES = {getattr(torch, row.torch): stored for stored, row in STORED.items() if row.torch}


class TorchFile(NamedTuple):
    """The tensors of a model by the names that its file has, and which of a training's it is.

    Self-Forcing and its relatives save the model that they train as a `generator`, and its moving
    average as `generator_ema`; of another file `generator` is empty.
    """

    tensors: dict[str, SourceTensor]
    generator: str


def read_torch_file(path: Path, ema: bool | None = None) -> TorchFile:
    """The model of a file.

    Of one with `generator` and `generator_ema`, as Self-Forcing's, ema is whether it is the latter;
    None takes that, or the one that is there. Raises BundleError as `load_saved` does, and
    BadRequest when there is no model in the file, or not this one, tensors overlap, or one is not
    dense and on the CPU.
    """
    saved = load_saved(path)
    wanted = _MODELS if ema is None else (GENERATORS[ema], *_OTHERS)
    tensors, generator = _find_model(saved, wanted)
    if ema is not None and generator != GENERATORS[ema]:
        raise lacks_generator(path, ema, _find_model(saved, _MODELS)[1])
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
    return TorchFile(named, generator)


def lacks_generator(place: str | Path, ema: bool, other: str = "") -> BadRequest:
    """The refusal of a checkpoint without the generator that was asked for; other is one it has."""
    option, wanted = ema_option(ema), GENERATORS[ema]
    found = f"{other} alone" if other else "one model, under neither generator nor generator_ema"
    return BadRequest(
        f"{option}: {printable(place)} has no {wanted}, it holds {found}: leave {option} out, and "
        f"that is read"
    )


def ema_option(ema: bool) -> str:
    """The option of the command line that asks for the average, or for the model without."""
    return "--ema" if ema else "--no-ema"


def _find_model(
    saved: object, models: Sequence[str], depth: int = 0
) -> tuple[dict[str, Tensor], str]:
    """The tensors by name, none when there are none, and which generator they are."""
    if not isinstance(saved, dict) or depth > _DEEPEST:
        return {}, ""
    for key in models:
        if isinstance(saved.get(key), dict) and saved[key]:
            tensors, generator = _find_model(saved[key], models, depth + 1)
            return tensors, generator or (key if key in GENERATORS.values() else "")
    named = {str(name): t for name, t in saved.items() if isinstance(t, Tensor)}
    return named if len(named) == len(saved) else {}, ""


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
