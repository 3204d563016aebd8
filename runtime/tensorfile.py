"""Read and write safetensors files with seek and readinto, so that no page of them stays mapped.

The `safetensors` library maps a file, and touched pages of a mapping count as resident memory; a
conversion that streams 57 GB must not. Format: huggingface/safetensors, README, "Format".
"""

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from wanexport.runtime.durable import durable_file
from wanexport.runtime.errors import WanExportError

ITEM_SIZES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "U8": 1, "I8": 1}
_NUMPY_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "I64": np.int64,
    "I32": np.int32,
    "U8": np.uint8,
    "I8": np.int8,
}
_MAX_HEADER = 100_000_000  # the library's own limit
_MAX_RANK = 32  # numpy 1's limit
_MAX_SIZE = 1 << 48  # of a dimension or an offset: beyond any file


@dataclass(frozen=True)
class TensorEntry:
    """One tensor in a safetensors file; `offset` counts bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


def _raw_header(path: Path) -> bytes:
    """The length field and the JSON that follows it. Raises WanExportError when either is cut."""
    try:
        file_size = path.stat().st_size
        with path.open("rb") as file:
            length_field = file.read(8)
            length = int.from_bytes(length_field, "little")
            if len(length_field) < 8 or length > min(_MAX_HEADER, file_size - 8):
                raise WanExportError(
                    f"{path} is not a safetensors file, or is cut short: download it again"
                )
            return length_field + file.read(length)
    except OSError as error:
        raise WanExportError(f"cannot read {path}: {error.strerror}") from error


def header_sha256(path: Path) -> str:
    """SHA-256 of the length field and header: names, dtypes, shapes and offsets of all tensors."""
    return hashlib.sha256(_raw_header(path)).hexdigest()


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Entries of all tensors by name.

    Raises WanExportError when the header is damaged, an entry does not fit its shape, or the file
    is shorter than its entries say.
    """
    raw = _raw_header(path)
    try:
        header = json.loads(raw[8:])
        header.pop("__metadata__", None)
        entries = {name: _entry(fields, len(raw)) for name, fields in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WanExportError(
            f"{path} has a damaged safetensors header ({error}): download it again"
        ) from error
    end = max((entry.offset + entry.size for entry in entries.values()), default=len(raw))
    if path.stat().st_size != end:
        raise WanExportError(
            f"{path} has {path.stat().st_size} bytes, its header describes {end}: download it again"
        )
    return entries


def _entry(fields: Mapping[str, Any], data_start: int) -> TensorEntry:
    begin, end = fields["data_offsets"]
    shape = tuple(fields["shape"])
    if any(type(n) is not int or not 0 <= n < _MAX_SIZE for n in (begin, end, *shape)):
        raise ValueError(f"offsets {begin}, {end} or shape {list(shape)[:8]} are no sizes")
    item_size = ITEM_SIZES.get(fields["dtype"])
    if end < begin or (item_size and prod(shape) * item_size != end - begin):
        raise ValueError(f"offsets {begin}..{end} do not hold {fields['dtype']} {list(shape)[:8]}")
    return TensorEntry(fields["dtype"], shape, data_start + begin, end - begin)


def make_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
) -> tuple[bytes, dict[str, TensorEntry]]:
    """Header bytes and entries for tensors given as name -> (dtype, shape).

    The bytes depend on nothing else: keys are sorted, there is no metadata, wide dtypes lie first
    so that every tensor is aligned to its item, and the data starts at a multiple of 64.
    """
    order = sorted(tensors, key=lambda name: (-ITEM_SIZES[tensors[name][0]], name))
    fields, position = {}, 0
    for name in order:
        dtype, shape = tensors[name]
        end = position + prod(shape) * ITEM_SIZES[dtype]
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: _entry(fields[name], len(header)) for name in order}


def read_array(path: Path, entry: TensorEntry) -> np.ndarray:
    """One tensor; bf16, which numpy lacks, is widened to fp32.

    Raises WanExportError for a dtype that is none of F64, F32, BF16, F16 and the integers.
    """
    bits = np.uint16 if entry.dtype == "BF16" else _NUMPY_DTYPES.get(entry.dtype)
    if bits is None:
        raise WanExportError(f"{path} holds a {entry.dtype} tensor: expected F32, BF16 or F16")
    buffer = bytearray(entry.size)
    with path.open("rb", buffering=0) as file:
        file.seek(entry.offset)
        if not read_fully(file, memoryview(buffer)):
            raise WanExportError(f"{path} ended while it was read: write it again")
    if len(entry.shape) > _MAX_RANK:
        raise WanExportError(f"{path} holds a tensor of {len(entry.shape)} dimensions: too many")
    array = np.frombuffer(buffer, bits).reshape(entry.shape)
    if entry.dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array


def read_fully(file: io.RawIOBase, view: memoryview) -> bool:
    """Fill view from the file's position; False when the file ends before it is full."""
    while view:
        count = file.readinto(view)
        if not count:
            return False
        view = view[count:]
    return True


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a file by name."""
    return {name: read_array(path, entry) for name, entry in read_header(path).items()}


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write fp32 arrays; the file appears whole or not at all."""
    header, entries = make_header({name: ("F32", array.shape) for name, array in arrays.items()})
    with durable_file(path) as file:
        file.write(header)
        for name in entries:
            file.write(np.ascontiguousarray(arrays[name], np.float32).data)
