"""The weights file of a bundle: its layout, what fills it, and reading it back.

A source gives each parameter in chunks and each is cast once, so that converting a checkpoint of
any size takes the memory of one chunk.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from wanexport.graphs import source_tensor
from wanexport.graphs.source_tensor import SourceTensor, read_chunks, read_values, torch_dtype
from wanexport.runtime import dtypes
from wanexport.runtime.bundle.durable import durable_file
from wanexport.runtime.bundle.signature import parameter_shapes, weights_layout
from wanexport.runtime.bundle.tensorfile import TensorEntry, read_header
from wanexport.runtime.errors import BadRequest, printable
from wanexport.runtime.wan_config import WanConfig

DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, dtypes.DTYPES[name].torch) for name in dtypes.PRECISIONS
}


class WeightSource(Protocol):
    """Gives parameters in chunks, and a hash that tells two sources apart."""

    def chunks(self, name: str) -> Iterator[Tensor]:
        """The parameter's elements in order, as 1-D tensors of its stored dtype."""
        ...

    def digest(self) -> str:
        """A hash of the content of all parameters."""
        ...


class CheckpointWeights:
    """Reads one expert's tensors from its files, chunk by chunk."""

    def __init__(self, tensors: Mapping[str, SourceTensor]) -> None:
        self.tensors = tensors
        self._hashes: dict[str, str] = {}

    def chunks(self, name: str) -> Iterator[Tensor]:
        """The parameter's elements in order, fp32 where it is quantised. Raises as read_chunks."""
        digest = hashlib.sha256()
        yield from read_chunks(self.tensors[name], digest.update)
        self._hashes[name] = digest.hexdigest()

    def digest(self) -> str:
        """A hash over names and bytes, not layout or shards; reads the tensors not yet read."""
        for name in self.tensors.keys() - self._hashes.keys():
            for _ in self.chunks(name):
                pass
        return hashlib.sha256(json.dumps(self._hashes, sort_keys=True).encode()).hexdigest()


class RandomWeights:
    """Seeded weights of a preset: each tensor from its own stream, so that none depends on order.

    Matrices have variance 1 / fan_in, and norms lie around 1, so that a forward of any depth stays
    in range and every parameter matters to its result.
    """

    def __init__(self, config: WanConfig, seed: int, expert: str) -> None:
        self.shapes = parameter_shapes(config)
        self.identity = f"{seed}/{expert}"

    def chunks(self, name: str) -> Iterator[Tensor]:
        """The parameter's elements in order, fp32."""
        seed = hashlib.sha256(f"{self.identity}/{name}".encode()).digest()
        generator = np.random.Generator(np.random.PCG64(int.from_bytes(seed, "little")))
        shape = self.shapes[name]
        centre, deviation = _distribution(name, shape)
        width = deviation * 12**0.5  # of the uniform distribution with this deviation
        left = int(np.prod(shape))
        while left:
            values = generator.random(min(left, source_tensor.CHUNK), dtype=np.float32)
            values -= 0.5
            values *= np.float32(width)
            values += np.float32(centre)
            left -= len(values)
            yield torch.from_numpy(values)

    def digest(self) -> str:
        """A hash of the seed, the expert and the shapes."""
        content = json.dumps([self.identity, dict(self.shapes)], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


def _distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of a random parameter."""
    if name.endswith("modulation"):
        return 0.0, float(shape[-1] ** -0.5)
    if len(shape) == 1 or name == "img_emb.emb_pos":
        is_norm = "norm" in name or re.match(r"img_emb\.proj\.[04]", name)
        return (1.0, 0.1) if is_norm and name.endswith("weight") else (0.0, 0.1)
    return 0.0, float(np.prod(shape[1:]) ** -0.5)


def write_weights(
    path: Path,
    config: WanConfig,
    dtype: str,
    source: WeightSource,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> str:
    """Stream a source into a weights file, casting each tensor once; return the file's SHA-256.

    Raises as write_tensors does.
    """
    return write_tensors(path, weights_layout(config, dtype), source, progress)


def write_tensors(
    path: Path,
    layout: tuple[bytes, Mapping[str, TensorEntry]],
    source: WeightSource,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> str:
    """Stream a source into a file of this header and these entries; return the file's SHA-256.

    The file appears under its name only when it is whole and on disk. progress is called with bytes
    done and in all. Raises BadRequest, naming the tensor, when values are NaN or infinite, or
    do not fit the dtype.
    """
    header, entries = layout
    total = sum(entry.size for entry in entries.values())
    digest, done = hashlib.sha256(header), 0
    with durable_file(path) as file:
        file.write(header)
        for name, entry in entries.items():
            stored = torch_dtype(entry.dtype)
            check = _FiniteCheck(name, stored)
            for chunk in source.chunks(name):
                check.add(chunk)
                cast = chunk.to(stored).view(torch.uint8).numpy().data
                file.write(cast)
                digest.update(cast)
                done += len(cast)
                progress(done, total)
            check.refuse()
    return digest.hexdigest()


class _FiniteCheck:
    """Counts in the chunks of a tensor what is NaN or infinite, or would be in another dtype."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name, self.dtype = name, dtype
        self.nan = self.infinite = self.beyond = self.total = 0

    def add(self, chunk: Tensor) -> None:
        """Count in one more chunk."""
        self.total += chunk.numel()
        # The extremes are NaN where a value is; they take a tenth of the time of looking at each.
        if not chunk.numel() or torch.stack(chunk.aminmax()).to(self.dtype).isfinite().all():
            return
        nan, infinite = int(chunk.isnan().sum()), int(chunk.isinf().sum())
        self.nan += nan
        self.infinite += infinite
        self.beyond += int((~chunk.to(self.dtype).isfinite()).sum()) - nan - infinite

    def refuse(self) -> None:
        """Raise BadRequest when there was any."""
        name = printable(self.name)
        if self.nan or self.infinite:
            raise BadRequest(
                f"{name} has {self.nan} NaN and {self.infinite} infinite of {self.total} values: "
                f"the checkpoint is damaged, download it again or take an earlier one"
            )
        if self.beyond:
            dtype, others = _TOO_NARROW[self.dtype]
            raise BadRequest(
                f"{name} has values beyond {dtype}'s {torch.finfo(self.dtype).max:.6g} "
                f"({self.beyond} of {self.total}): build with --dtype {others}"
            )


_TOO_NARROW = {torch.float16: ("fp16", "bf16 or fp32"), torch.bfloat16: ("bf16", "fp32")}


def read_tensor(source: SourceTensor, *, fits: torch.dtype | None = None) -> Tensor:
    """One tensor in its stored dtype, or in fp32 where it is quantised.

    Raises as read_chunks does, and BadRequest when a value is not finite, or would not be in the
    dtype that it must fit.
    """
    tensor = read_values(source)
    check = _FiniteCheck(source.name, fits or tensor.dtype)
    check.add(tensor)
    check.refuse()
    return tensor


def bundle_tensors(file: Path, names: Mapping[str, str]) -> dict[str, SourceTensor]:
    """Where a weights file holds each parameter; names maps parameters to tensors of the file."""
    entries = read_header(file)
    return {parameter: SourceTensor(file, entries[name], name) for parameter, name in names.items()}
