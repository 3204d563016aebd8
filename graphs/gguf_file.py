"""Read the header of a GGUF file, and not the data; nothing here knows a model.

Whatever its bytes say, reading one takes at most a header of 16 MiB and part of a second. Format:
ggml-org/ggml, docs/gguf.md.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from struct import Struct

from wanexport.graphs.gguf_blocks import TYPES, UNREAD
from wanexport.runtime.bundle.regular_file import open_regular
from wanexport.runtime.bundle.tensorfile import TensorEntry, read_at
from wanexport.runtime.errors import BadRequest, BundleError, printable

_FIRST = 1 << 16  # bytes read at first, then as many again until the header ends
_MAX_HEADER = 16 << 20  # of a Wan 0.1 MB; the rest is for metadata
_MAX_TENSORS = 20_000  # a Wan has 1304
_MAX_KEYS = 10_000
_MAX_STRINGS = 300_000  # in arrays; the tokenizer of a text encoder has 256384
_MAX_NAME = 1000
_MAX_RANK = 8  # GGML's limit is 4, which a Wan's patch_embedding.weight exceeds
_MAX_SIZE = 1 << 48  # of a dimension, an offset or a tensor: beyond any file
_ALIGNMENTS = [1 << power for power in range(17)]
_ALIGNMENT = 32  # where general.alignment is not given
_STRING, _ARRAY = 8, 9  # types of a value in the metadata, beside these
_SCALARS = {kind: Struct(f"<{code}") for kind, code in zip(range(8), "BbHhIifB")}
_SCALARS |= {10: Struct("<Q"), 11: Struct("<q"), 12: Struct("<d")}
_U32, _U64, _COUNTS, _OF_ARRAY = Struct("<I"), Struct("<Q"), Struct("<QQ"), Struct("<IQ")
_INFOS = tuple(Struct(f"<{rank}QIQ") for rank in range(_MAX_RANK + 1))  # after a tensor's rank
_KEPT = ("general.architecture", "general.alignment", "split.count")
_SHAPE = "comfy.gguf.orig_shape."  # of the tensor that follows

_Value = str | int | float | tuple[int | float, ...] | None


@dataclass(frozen=True)
class GgufHeader:
    """A GGUF file's architecture, "" when it states none, and where its tensors lie."""

    architecture: str
    tensors: dict[str, TensorEntry]  # dtype is GGML's name, shape in PyTorch's order


class _UnreadableError(Exception):
    """What the file is, after its name, and what to do."""


def _damaged(reason: str) -> _UnreadableError:
    return _UnreadableError(f"has a damaged GGUF header ({reason}): download it again")


def read_gguf(file: Path) -> GgufHeader:
    """The architecture and the tensors of a GGUF file, whose data is not read.

    Raises BadRequest when the file cannot be read, is no GGUF of a version and byte order that is
    read, one part of several, cut short or damaged, or has a tensor of a type that is not read.
    """
    name = printable(file)
    try:
        with open(open_regular(file), "rb") as stream:
            return _read(_Bytes(stream.fileno()))
    except _UnreadableError as error:
        raise BadRequest(f"{name} {error}") from error
    except BundleError as error:  # no regular file
        raise BadRequest(str(error)) from error
    except OSError as error:
        raise BadRequest(f"cannot read {name}: {error.strerror}") from error


class _Bytes:
    """The bytes at the start of a file in order, read no further than they are asked for."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.file_size = os.fstat(descriptor).st_size
        self.raw = bytearray()
        self.position = 0
        self.strings = 0  # skipped so far

    def skip(self, size: int) -> int:
        """Go past so many bytes, which `raw` then has; where they begin."""
        begin, self.position = self.position, self.position + size
        if self.position > len(self.raw):
            self._read_to(self.position)
        return begin

    def _read_to(self, end: int) -> None:
        if end > _MAX_HEADER:
            raise _UnreadableError(
                f"has a header of more than {_MAX_HEADER} bytes, which no model takes: it is "
                f"damaged, download it again"
            )
        begin, known = len(self.raw), min(self.file_size, _MAX_HEADER)
        more = bytearray(min(max(end, 2 * begin, _FIRST), known) - begin)
        if end > known or not read_at(self.descriptor, memoryview(more), begin):
            raise _UnreadableError("is cut short, within its header: download it again")
        self.raw += more

    def unpack(self, layout: Struct) -> tuple[int, ...]:
        """The numbers that come next."""
        return layout.unpack_from(self.raw, self.skip(layout.size))

    def text(self) -> str:
        """The string that comes next, which is a name."""
        (length,) = self.unpack(_U64)
        if length > _MAX_NAME:
            raise _damaged(f"a name of {length} bytes, more than {_MAX_NAME}")
        begin = self.skip(length)
        try:
            return self.raw[begin : self.position].decode()
        except UnicodeDecodeError as error:
            raise _damaged("a name that is no UTF-8") from error

    def skip_strings(self, count: int) -> None:
        """Go past so many strings."""
        self.strings += count
        if self.strings > _MAX_STRINGS:
            raise _damaged(f"{self.strings} strings in arrays, more than {_MAX_STRINGS}")
        for _ in range(count):
            self.skip(*_U64.unpack_from(self.raw, self.skip(_U64.size)))


def _read(header: _Bytes) -> GgufHeader:
    tensor_count, key_count = _read_counts(header)
    metadata = _read_metadata(header, key_count)
    architecture, parts = metadata.get(_KEPT[0]), metadata.get(_KEPT[2])
    if isinstance(parts, int) and parts > 1:
        raise _UnreadableError(
            f"is one of the {parts} parts of a split GGUF model, which is not read: merge them "
            f"with llama.cpp's llama-gguf-split --merge"
        )
    tensors = _read_tensors(header, tensor_count, metadata)
    return GgufHeader(architecture if isinstance(architecture, str) else "", tensors)


def _read_counts(header: _Bytes) -> tuple[int, int]:
    """How many tensors and keys follow, after a check of what stands before them."""
    header.skip(min(4, header.file_size))
    if not b"GGUF".startswith(header.raw[:4]):
        raise _UnreadableError("is no GGUF file, whose first bytes are GGUF: download it again")
    (version,) = header.unpack(_U32)
    if version and not version & 0xFFFF:
        raise _UnreadableError(
            "is a big-endian GGUF file, which is not read: take a little-endian one"
        )
    if version not in (2, 3):
        raise _UnreadableError(
            f"is a GGUF file of version {version}, which is not read: take one of version 2 or 3"
        )
    tensors, keys = header.unpack(_COUNTS)
    for count, what, limit in ((tensors, "tensors", _MAX_TENSORS), (keys, "keys", _MAX_KEYS)):
        if count > limit:
            raise _damaged(f"{count} {what}, more than {limit}")
    return tensors, keys


def _read_metadata(header: _Bytes, count: int) -> dict[str, _Value]:
    """All keys, with the values of those that are kept."""
    found: dict[str, _Value] = {}
    for _ in range(count):
        key = header.text()
        if key in found:
            raise _damaged(f"the key {printable(key)} is there twice")
        found[key] = _read_value(header, key)
    return found


def _read_value(header: _Bytes, key: str) -> _Value:
    """A key's value; None for a text or an array that is not kept, which is gone past."""
    kept = key in _KEPT or key.startswith(_SHAPE)
    (kind,) = header.unpack(_U32)
    if kind == _STRING and kept:
        return header.text()
    count = 1
    if is_array := kind == _ARRAY:
        kind, count = header.unpack(_OF_ARRAY)
    if kind == _STRING:
        header.skip_strings(count)
        return None
    if kind not in _SCALARS:
        what = "an array of arrays" if kind == _ARRAY else f"a value of the unknown type {kind}"
        raise _damaged(f"{printable(key)} is {what}")
    layout = _SCALARS[kind]
    if not kept or count > _MAX_RANK:
        header.skip(count * layout.size)
        return None
    values = tuple(header.unpack(layout)[0] for _ in range(count))
    return values if is_array else values[0]


def _read_tensors(
    header: _Bytes, count: int, metadata: Mapping[str, _Value]
) -> dict[str, TensorEntry]:
    infos: dict[str, tuple[int, ...]] = {}
    for _ in range(count):
        name = header.text()
        if name in infos:
            raise _damaged(f"the tensor {printable(name)} is there twice")
        (rank,) = header.unpack(_U32)
        if rank > _MAX_RANK:
            raise _damaged(f"{printable(name)} has {rank} dimensions, more than {_MAX_RANK}")
        infos[name] = header.unpack(_INFOS[rank])
    alignment = metadata.get(_KEPT[1], _ALIGNMENT)
    if not isinstance(alignment, int) or alignment not in _ALIGNMENTS:
        raise _damaged(
            f"the alignment {printable(alignment)}, no power of two up to {_ALIGNMENTS[-1]}"
        )
    end = header.position
    start = end + -end % alignment
    entries = {name: _entry(name, info, start, metadata) for name, info in infos.items()}
    _check_layout(entries, end, alignment, header.file_size)
    return entries


def _entry(
    name: str, info: tuple[int, ...], start: int, metadata: Mapping[str, _Value]
) -> TensorEntry:
    """A tensor of these dimensions, type and offset into the data, which begins at start."""
    *dims, kind, offset = info
    if kind not in TYPES:
        what = UNREAD.get(kind, f"the unknown type {kind}")
        raise _UnreadableError(
            f"has {printable(name)} in {what}, which is not read: take a Q4_0 to Q8_0 file"
        )
    dtype, elements, size = TYPES[kind]
    count = prod(dims)
    if not 0 < count < _MAX_SIZE or offset >= _MAX_SIZE:
        raise _damaged(f"the dimensions or the offset of {printable(name)} are no sizes")
    if (dims[0] if dims else 1) % elements:
        raise _damaged(f"{printable(name)} has rows that are no whole blocks of {dtype}")
    shape = tuple(reversed(dims))
    if _SHAPE + name in metadata:
        shape = _stated_shape(name, count, metadata[_SHAPE + name])
    return TensorEntry(dtype, shape, start + offset, count // elements * size)


def _stated_shape(name: str, count: int, stated: _Value) -> tuple[int, ...]:
    """The shape that the metadata has for a tensor of so many elements."""
    sizes = stated if isinstance(stated, tuple) else ()
    shape = tuple(size for size in sizes if isinstance(size, int) and size > 0)
    if sizes != stated or shape != sizes or prod(shape) != count:
        raise _damaged(f"{_SHAPE}{printable(name)} is no shape of its {count} elements")
    return shape


def _check_layout(
    entries: Mapping[str, TensorEntry], end: int, alignment: int, file_size: int
) -> None:
    """Refuse tensors that overlap, gaps between them, and a file that ends elsewhere than they.

    end is where the header does. It and each tensor are padded to the alignment; gguf-py pads the
    last one too, other writers may not.
    """
    padded = end + -end % alignment
    for name, entry in sorted(entries.items(), key=lambda item: item[1].offset):
        if entry.offset != padded:
            raise _damaged(
                f"{printable(name)} begins at byte {entry.offset}, expected {padded}, where what "
                f"lies before it ends"
            )
        end = entry.offset + entry.size
        padded = end + -end % alignment
    if file_size < end:
        raise _UnreadableError(
            f"is cut short: it has {file_size} bytes, its header describes {end}; download it again"
        )
    if file_size > padded:
        raise _damaged(f"it describes {padded} bytes of a file that has {file_size}")
