"""Read and write safetensors files without a mapping, so that no page of them stays mapped.

The `safetensors` library maps a file, and touched pages of a mapping count as resident memory; a
conversion that streams 57 GB must not. Format: huggingface/safetensors, README, "Format".
"""

import hashlib
import json
import os
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from wanexport.runtime.bundle.durable import durable_file
from wanexport.runtime.bundle.regular_file import open_regular, read_into
from wanexport.runtime.dtypes import STORED
from wanexport.runtime.errors import BundleError, printable

# A Wan's header takes 0.2 MB. The rest is for metadata, which may hold a picture or a workflow.
# Parsing takes up to 40 bytes for each of the header.
_MAX_HEADER = 16 << 20
_MAX_TENSORS = 100_000  # a Wan has 1304
_MAX_NAME = 1000
_MAX_RANK = 32  # numpy 1's limit; a product of thousands of dimensions takes minutes
_MAX_SIZE = 1 << 48  # of a dimension or an offset: beyond any file


@dataclass(frozen=True)
class TensorEntry:
    """One tensor in a safetensors file; `offset` counts bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


def header_sha256(file: Path | int) -> str:
    """SHA-256 of the length field and header: names, dtypes, shapes and offsets of all tensors.

    file is a path or a descriptor, whose position stays. Raises BundleError as read_header does
    for a file without a whole header.
    """
    with _opened(file) as (descriptor, name):
        return hashlib.sha256(_raw_header(descriptor, name)).hexdigest()


def read_header(file: Path | int) -> dict[str, TensorEntry]:
    """Entries of all tensors by name; file is a path or a descriptor, whose position stays.

    Raises BundleError when the file is no regular one, the header is damaged or over 16 MiB, a
    dtype is unknown, an entry does not fit its shape, or the tensors overlap, leave gaps or do not
    end where the file does.
    """
    with _opened(file) as (descriptor, name):
        raw = _raw_header(descriptor, name)
        entries, _ = _parse(raw, name)
        _check_layout(entries, len(raw), os.fstat(descriptor).st_size, name)
        return entries


def read_metadata(file: Path | int) -> dict[str, Any]:
    """The `__metadata__` of the header, empty where it has none. Raises as read_header does."""
    with _opened(file) as (descriptor, name):
        return _parse(_raw_header(descriptor, name), name)[1]


@contextmanager
def _opened(file: Path | int) -> Iterator[tuple[int, str]]:
    """A descriptor of the file, and its name for errors; closed again if it was opened here."""
    if isinstance(file, int):
        yield file, printable(_path_of(file))
        return
    try:
        descriptor = open_regular(file)
    except OSError as error:
        raise BundleError(f"cannot read {printable(file)}: {error.strerror}") from error
    try:
        yield descriptor, printable(file)
    finally:
        os.close(descriptor)


def _path_of(descriptor: int) -> Path:
    """The path that an open file has, where the system tells."""
    try:
        return Path(os.readlink(f"/proc/self/fd/{descriptor}"))
    except OSError:
        return Path("the file")


def _read(descriptor: int, size: int, offset: int) -> bytes:
    buffer = bytearray(size)
    return bytes(buffer[: read_into(descriptor, memoryview(buffer), offset)])


def _raw_header(descriptor: int, name: str) -> bytes:
    """The length field and the JSON that follows it."""
    try:
        length_field = _read(descriptor, 8, 0)
        length, left = int.from_bytes(length_field, "little"), os.fstat(descriptor).st_size - 8
        if len(length_field) < 8 or length > left:
            raise BundleError(
                f"{name} is not a safetensors file, or is cut short: download it again"
            )
        if length > _MAX_HEADER:
            raise BundleError(
                f"{name} has a header of {length} bytes, more than the {_MAX_HEADER} that any "
                f"model takes: it is damaged, download it again"
            )
        raw = length_field + _read(descriptor, length, 8)
    except OSError as error:
        raise BundleError(f"cannot read {name}: {error.strerror}") from error
    if len(raw) < 8 + length:
        raise BundleError(f"{name} ended while its header was read: download it again")
    return raw


def _parse(raw: bytes, name: str) -> tuple[dict[str, TensorEntry], dict[str, Any]]:
    """Entries by name, and the metadata."""
    try:
        header = json.loads(raw[8:].decode(), object_pairs_hook=_without_duplicates)
        if not isinstance(header, dict):
            raise ValueError("it is no object")
        metadata = header.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict):
            raise ValueError("its metadata is no object")
        if len(header) > _MAX_TENSORS:
            raise ValueError(f"it has {len(header)} tensors, more than {_MAX_TENSORS}")
        entries = {key: _entry(key, fields, len(raw)) for key, fields in header.items()}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = printable(error, 300)
        raise BundleError(
            f"{name} has a damaged safetensors header ({reason}): download it again"
        ) from error
    return entries, metadata


def _without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("it has a name twice")
    return found


def _entry(name: str, fields: Mapping[str, Any], data_start: int) -> TensorEntry:
    if not isinstance(fields, dict) or len(name) > _MAX_NAME:
        raise ValueError(f"{printable(name)} is no tensor")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in STORED:
        raise ValueError(
            f"{printable(name)} has the dtype {reprlib.repr(dtype)}, which safetensors lacks"
        )
    if not isinstance(shape, list) or len(shape) > _MAX_RANK:
        rank = f"has {len(shape)} dimensions" if isinstance(shape, list) else "has no shape"
        raise ValueError(f"{printable(name)} {rank}, expected a list of up to {_MAX_RANK}")
    if not isinstance(offsets, list) or len(offsets) != 2:
        raise ValueError(f"{printable(name)} has no two offsets")
    begin, end = offsets
    if any(type(n) is not int or not 0 <= n < _MAX_SIZE for n in (begin, end, *shape)):
        raise ValueError(f"the offsets or the shape of {printable(name)} are no sizes")
    if end < begin or prod(shape) * STORED[dtype].bits != 8 * (end - begin):
        raise ValueError(f"offsets {begin}..{end} do not hold {printable(name)}, {dtype} {shape}")
    return TensorEntry(dtype, tuple(shape), data_start + begin, end - begin)


def _check_layout(
    entries: Mapping[str, TensorEntry], data_start: int, file_size: int, name: str
) -> None:
    """Refuse tensors that overlap, gaps between them, and a file that ends elsewhere than they."""
    end = data_start
    for tensor, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].size)):
        if entry.offset != end:
            raise BundleError(
                f"{name} has a damaged safetensors header ({printable(tensor)} begins at byte "
                f"{entry.offset}, what lies before it ends at {end}): download it again"
            )
        end = entry.offset + entry.size
    if file_size != end:
        raise BundleError(
            f"{name} has {file_size} bytes, its header describes {end}: download it again"
        )


def make_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
) -> tuple[bytes, dict[str, TensorEntry]]:
    """Header bytes and entries for tensors given as name -> (dtype, shape).

    The bytes depend on nothing else: keys are sorted, there is no metadata, wide dtypes lie first
    so that every tensor is aligned to its item, and the data starts at a multiple of 64.
    """
    order = sorted(tensors, key=lambda name: (-STORED[tensors[name][0]].bits, name))
    spans, position = {}, 0
    for name in order:
        dtype, shape = tensors[name]
        spans[name] = (position, position + prod(shape) * STORED[dtype].bits // 8)
        position = spans[name][1]
    fields = {
        name: {"dtype": dtype, "shape": list(shape), "data_offsets": spans[name]}
        for name, (dtype, shape) in tensors.items()
    }
    text = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)
    header = len(text).to_bytes(8, "little") + text
    entries = {
        name: TensorEntry(*tensors[name], len(header) + begin, end - begin)
        for name, (begin, end) in spans.items()
    }
    return header, entries


def read_array(file: Path | int, entry: TensorEntry) -> np.ndarray:
    """One tensor; bf16, which numpy lacks, is widened to fp32.

    Raises BundleError for a dtype that numpy lacks, and when the file ends early.
    """
    bits = "uint16" if entry.dtype == "BF16" else STORED[entry.dtype].numpy
    with _opened(file) as (descriptor, name):
        if not bits:
            raise BundleError(
                f"{name} holds a {entry.dtype} tensor, which is not read: expected F32, BF16 or F16"
            )
        buffer = bytearray(entry.size)
        if not read_at(descriptor, memoryview(buffer), entry.offset):
            raise BundleError(f"{name} ended while it was read: write it again")
    array: np.ndarray = np.frombuffer(buffer, bits).reshape(entry.shape)
    if entry.dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array


def read_at(descriptor: int, view: memoryview, offset: int) -> bool:
    """Fill view from an offset of an open file, whose position stays; False when it ends before."""
    while view:
        try:
            count = read_into(descriptor, view, offset)
        except OSError as error:  # which names no file
            name = str(_path_of(descriptor))
            raise OSError(error.errno, error.strerror, name) from error
        if not count:
            return False
        view, offset = view[count:], offset + count
    return True


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a file by name."""
    with _opened(path) as (descriptor, _):
        return {name: read_array(descriptor, e) for name, e in read_header(descriptor).items()}


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write fp32 arrays; the file appears whole or not at all."""
    header, entries = make_header({name: ("F32", array.shape) for name, array in arrays.items()})
    with durable_file(path) as file:
        file.write(header)
        for name in entries:
            file.write(np.ascontiguousarray(arrays[name], np.float32).data)
