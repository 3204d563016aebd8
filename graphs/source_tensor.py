"""One tensor of a checkpoint: where it lies, and how its values follow from what is stored.

Quantised values become fp32, w = q * scale, chunk by chunk: reading takes the memory of one chunk.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wanexport.graphs.gguf_blocks import block_of, dequantize
from wanexport.runtime.bundle.regular_file import open_regular
from wanexport.runtime.bundle.tensorfile import TensorEntry, read_at
from wanexport.runtime.dtypes import DTYPES, PRECISIONS, STORED
from wanexport.runtime.errors import BadRequest, BundleError, printable

CHUNK = 1 << 23  # elements read and converted at a time: 32 MB of fp32
FLOATS = tuple(DTYPES[name].stored for name in PRECISIONS)
SCALED = ("F8_E4M3", "F8_E5M2", "I8")  # what a scale turns into values

_Seen = Callable[[memoryview], object]


@dataclass(frozen=True)
class SourceTensor:
    """Where one tensor of a checkpoint lies.

    The entry's dtype is safetensors' name, or GGML's of a quantised tensor in a GGUF file, and its
    shape that of the values. `scale` is what quantised values are multiplied by. `mapped` is the
    tensor itself, of a file of torch.save, where the entry tells no offset.
    """

    file: Path
    entry: TensorEntry
    name: str  # as the file has it
    scale: "Scale | None" = None
    mapped: Tensor | None = None

    @property
    def is_quantised(self) -> bool:
        """Whether values have to be computed from what is stored."""
        return self.entry.dtype not in FLOATS


@dataclass(frozen=True)
class Scale:
    """The factors of a quantised tensor: one [1, 1], or [rows, groups] of its [rows, columns].

    Each group of a row is equally many neighbouring values.
    """

    tensor: SourceTensor
    rows: int
    groups: int


def read_chunks(source: SourceTensor, seen: _Seen = lambda raw: None) -> Iterator[Tensor]:
    """The values in order, as 1-D tensors that hold until the next: fp32 where quantised.

    What decides the values, scales first, is shown to `seen`. Raises BundleError when the file ends
    early, and BadRequest for a scale that is not positive and finite.
    """
    factors = None if source.scale is None else _read_factors(source.scale, source.name, seen)
    done = 0
    for raw in _read_stored(source, _chunk(source)):
        seen(raw)
        values = _decode(raw, source.entry.dtype)
        if factors is not None:
            _multiply(values, factors, source.entry.shape, done)
        done += len(values)
        yield values


def read_values(source: SourceTensor) -> Tensor:
    """All values in their shape. Raises as read_chunks does."""
    dtype = torch.float32 if source.is_quantised else torch_dtype(source.entry.dtype)
    return gather(read_chunks(source), source.entry.shape, dtype)


def gather(chunks: Iterable[Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of this shape and dtype with the values of 1-D chunks, in order."""
    values, done = torch.empty(prod(shape), dtype=dtype), 0
    for chunk in chunks:
        values[done : done + len(chunk)] = chunk
        done += len(chunk)
    return values.reshape(shape)


def torch_dtype(stored: str) -> torch.dtype:
    """What PyTorch calls a dtype of safetensors."""
    dtype: torch.dtype = getattr(torch, STORED[stored].torch)
    return dtype


def _chunk(source: SourceTensor) -> int:
    """Elements of a chunk: whole rows of a scaled tensor, whole blocks of one in GGUF."""
    columns = source.entry.shape[-1] if source.scale is not None else 1
    return max(1, CHUNK // columns) * columns


def _read_stored(source: SourceTensor, elements: int) -> Iterator[memoryview]:
    """The stored bytes of so many elements at a time; each view holds until the next."""
    if source.mapped is not None:
        for values in source.mapped.reshape(-1).split(elements):
            yield memoryview(values.contiguous().view(torch.uint8).numpy().data)
        return
    entry, done = source.entry, 0
    buffer = bytearray(min(entry.size, _bytes(entry.dtype, elements)))
    with open(open_regular(source.file), "rb") as stream:
        while done < entry.size:
            view = memoryview(buffer)[: min(entry.size - done, len(buffer))]
            if not read_at(stream.fileno(), view, entry.offset + done):
                raise BundleError(
                    f"{printable(source.file)} ended while it was read: write it again, or "
                    f"download it again"
                )
            done += len(view)
            yield view


def _bytes(dtype: str, elements: int) -> int:
    if dtype in STORED:
        return elements * STORED[dtype].itemsize
    block, size = block_of(dtype)
    return elements // block * size


def _decode(raw: memoryview, dtype: str) -> Tensor:
    if dtype not in STORED:
        return torch.from_numpy(dequantize(np.frombuffer(raw, np.uint8), dtype))
    stored = torch.frombuffer(raw, dtype=torch_dtype(dtype))
    return stored if dtype in FLOATS else stored.to(torch.float32)


def _read_factors(scale: Scale, name: str, seen: _Seen) -> Tensor:
    """The factors, fp32 [rows, groups, 1]."""
    factors = torch.cat([chunk.float() for chunk in read_chunks(scale.tensor, seen)])
    if not ((factors > 0) & factors.isfinite()).all():
        raise BadRequest(
            f"{printable(scale.tensor.name)}, the scale of {printable(name)}, has values that are "
            f"NaN, infinite, zero or negative: the checkpoint is damaged, download it again"
        )
    return factors.reshape(scale.rows, scale.groups, 1)


def _multiply(values: Tensor, factors: Tensor, shape: tuple[int, ...], done: int) -> None:
    """Scale in place a chunk that begins after `done` values, at the start of a row."""
    first = done // shape[-1]
    rows = values.reshape(-1, factors.shape[1], shape[-1] // factors.shape[1])
    rows *= factors if len(factors) == 1 else factors[first : first + len(rows)]
