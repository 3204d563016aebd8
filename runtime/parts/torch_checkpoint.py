"""Read a .pth file, fill a model with its tensors, free it again.

The file is mapped, not read: its tensors take memory where they are used. Only tensors are
unpickled, so a file can execute nothing. This file imports PyTorch: import it where a model is
opened.
"""

import gc
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO, TypeVar
from zipfile import ZIP_STORED, ZipFile, ZipInfo

import torch
from torch import Tensor, nn

from wanexport.runtime.bundle.pinned_file import pin_opened
from wanexport.runtime.bundle.regular_file import open_regular
from wanexport.runtime.dtypes import DTYPES, PRECISIONS
from wanexport.runtime.errors import BundleError, WanExportError, printable
from wanexport.runtime.parts.stored import StoredTensor

_SHOWN = 4  # of the tensors that do not fit, in an error
_FLOATS = [DTYPES[name].torch for name in PRECISIONS]
_HEADER = 30  # bytes of a record's header in a zip file, before its name
_DATA = re.compile(r"[^/]+/data/[0-9]+")  # a tensor's storage, in what torch.save writes
_ZIP = b"PK\x03\x04"  # what torch.save writes since PyTorch 1.6; an older file cannot be mapped

Model = TypeVar("Model", bound=nn.Module)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """All tensors of a .pth file by name, on the CPU and mapped to the file.

    Raises BundleError as load_saved does, and when the file holds no state dict.
    """
    return _state_dict(load_saved(path), path)


def read_stored(path: Path) -> dict[str, StoredTensor]:
    """The same tensors, and where each lies in the file. Raises as read_state_dict does."""
    with _reading(path) as descriptor:
        state = _state_dict(_load(descriptor, path), path)
        tensors = {name: tensor.detach() for name, tensor in state.items()}
        file, start = pin_opened(path, descriptor), _start(tensors.values(), descriptor)
    return {
        name: StoredTensor(tensor)
        if start is None or not tensor.is_contiguous()
        else StoredTensor(tensor, file, tensor.data_ptr() - start)
        for name, tensor in tensors.items()
    }


def load_saved(path: Path) -> Any:
    """What torch.save wrote, its tensors on the CPU and mapped to the file.

    Raises BundleError when there is no such file, it is damaged, or it holds what could run code.
    """
    with _reading(path) as descriptor:
        return _load(descriptor, path)


@contextmanager
def _reading(path: Path) -> Iterator[int]:
    """A descriptor of the file; what goes wrong while it is read is a BundleError."""
    try:
        descriptor = open_regular(path)
    except OSError as error:
        raise BundleError(
            f"cannot read {printable(path)}: {error.strerror}: pass a checkpoint that has it"
        ) from error
    try:
        yield descriptor
    except WanExportError:
        raise
    except UnpicklingError as error:
        raise BundleError(
            f"{printable(path)} is damaged or holds more than tensors, which could run code, and "
            f"is not read: download the official file again"
        ) from error
    except Exception as error:  # of many kinds, for the places where a file may be damaged
        raise BundleError(
            f"{printable(path)} is no file of torch.save, or is cut short: download it again"
        ) from error
    finally:
        os.close(descriptor)


def _load(descriptor: int, path: Path) -> Any:
    """What torch.save wrote into an open file, mapped where its format allows."""
    with open(descriptor, "rb", closefd=False) as file:
        mappable = _is_zip(file)
        if mappable:
            with ZipFile(file) as archive:
                records = archive.infolist()
            # torch.save packs nothing: a small file could not be unpacked in bounded memory.
            if any(record.compress_type != ZIP_STORED for record in records):
                raise ValueError("packed records")
        # By the descriptor, where it has a name: another file may have the path meanwhile.
        own = Path(f"/proc/self/fd/{descriptor}")
        name = own if own.exists() else path
        return torch.load(name, map_location="cpu", weights_only=True, mmap=mappable)


def _is_zip(file: BinaryIO) -> bool:
    file.seek(0)
    return file.read(len(_ZIP)) == _ZIP


def _state_dict(state: Any, path: Path) -> dict[str, Tensor]:
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise BundleError(
            f"{printable(path)} is no state dict: expected tensors by name, download the official "
            f"file again"
        )
    return dict(state)


def _start(tensors: Iterable[Tensor], descriptor: int) -> int | None:
    """The address where the file is mapped, or None where the tensors do not tell.

    In the order of the file, its records are the tensors' storages in the order of addresses: all
    of them must lie equally far from their records.
    """
    with open(descriptor, "rb", closefd=False) as file:
        if not _is_zip(file):
            return None
        with ZipFile(file) as archive:
            records = [r for r in archive.infolist() if _DATA.fullmatch(r.filename)]
        offsets = sorted(_data_offset(file, record) for record in records if record.file_size)
    addresses = sorted({t.untyped_storage().data_ptr() for t in tensors if t.numel()})
    starts = {address - offset for address, offset in zip(addresses, offsets)}
    return starts.pop() if len(addresses) == len(offsets) and len(starts) == 1 else None


def _data_offset(file: BinaryIO, record: ZipInfo) -> int:
    """Where the bytes of a stored record begin: after its header, a name and an extra field."""
    file.seek(record.header_offset + _HEADER - 4)
    name, extra = struct.unpack("<HH", file.read(4))
    return int(record.header_offset + _HEADER + name + extra)


def load_converted(model: Model, tensors: Mapping[str, Tensor], path: Path) -> Model:
    """Give a model built on the meta device its tensors, without a copy; it is in eval mode then.

    Tied parameters become two that share memory: tie them again. `path` is named in errors.
    Raises BundleError when a tensor is missing, unexpected, not of the model's shape or not
    fp32, bf16 or fp16.
    """
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    check_fit(expected, tensors, type(model), path)
    model.load_state_dict(dict(tensors), assign=True)
    return model.eval().requires_grad_(False)


def check_fit(
    expected: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, Tensor],
    model_class: type,
    path: Path,
) -> None:
    """Raise BundleError, with the first few, unless there are these tensors of these shapes."""
    problems = [f"missing {name}" for name in sorted(expected.keys() - tensors.keys())]
    problems += [
        f"unexpected {printable(name)}" for name in sorted(tensors.keys() - expected.keys())
    ]
    for name in sorted(expected.keys() & tensors.keys()):
        shape, dtype = list(tensors[name].shape), tensors[name].dtype
        if shape != list(expected[name]):
            problems.append(f"{name} is {shape}, expected {list(expected[name])}")
        elif str(dtype).removeprefix("torch.") not in _FLOATS:
            problems.append(f"{name} is {dtype}, expected {', '.join(_FLOATS)}")
    if problems:
        more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise BundleError(
            f"{printable(path)} does not fit {model_class.__name__}: {'; '.join(problems[:_SHOWN])}"
            f"{more}: download it again"
        )


def free_unused_memory() -> None:
    """Give back what models held that nothing refers to any more, on a GPU too."""
    gc.collect()  # the first call of a process can leave a model in a reference cycle
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
