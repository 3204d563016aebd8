"""Open a LoRA file: which tensors it has, the alphas in its header, and the values on demand.

Without an alpha the scale is 1 (alpha is the rank). So it is for PEFT's own files
(`base_model.model.`), whose alpha lies in a file beside them, which is not read; nor is a
rank-stabilised scale guessed.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wanexport.runtime.bundle.pinned_file import PinnedFile, pin
from wanexport.runtime.bundle.tensorfile import TensorEntry, read_at, read_header, read_metadata
from wanexport.runtime.dtypes import STORED
from wanexport.runtime.errors import BadRequest, BundleError, printable
from wanexport.runtime.lora.names import SECOND_EXPERT, other_kind, split

_METADATA = "lora_adapter_metadata"  # diffusers `loaders/lora_base.py`
FLOATS = ("F32", "BF16", "F16")
_SCALARS = (*FLOATS, "F64", "I64", "I32")


@dataclass(frozen=True)
class LoraTensor:
    """One tensor of a LoRA file."""

    key: str  # as the file has it
    module: str  # without prefix and suffix, in the file's spelling
    role: str  # empty: none that is known
    entry: TensorEntry


@dataclass(frozen=True)
class Alphas:
    """The alphas that diffusers writes into the header: one of all modules, and exceptions."""

    alpha: float
    exceptions: Mapping[str, tuple[int, float]]  # by a module's name or its end; the first wins
    rank_stabilised: bool

    def scale(self, module: str, rank: int) -> float:
        """What a low rank of this module is multiplied by (peft `tuners/lora/layer.py`)."""
        parts = module.split(".")
        ends = (".".join(parts[i:]) for i in range(len(parts)))
        found = [self.exceptions[end] for end in ends if end in self.exceptions]
        alpha = min(found)[1] if found else self.alpha
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


@dataclass(frozen=True)
class Lora:
    """An opened LoRA file; it holds no values."""

    file: PinnedFile
    tensors: tuple[LoraTensor, ...]
    alphas: Alphas | None

    @contextmanager
    def opened(self) -> Iterator["Values"]:
        """The file's values. Raises BundleError when it was changed since it was read."""
        with self.file.opened() as descriptor:
            yield Values(descriptor, self.file.path)


@dataclass(frozen=True)
class Values:
    """Reads tensors of an open LoRA file."""

    descriptor: int
    path: Path

    def tensor(self, tensor: LoraTensor) -> Tensor:
        """One tensor in its stored dtype. Raises BundleError when the file ends early."""
        entry = tensor.entry
        buffer = bytearray(entry.size)
        if not read_at(self.descriptor, memoryview(buffer), entry.offset):
            raise BundleError(f"{printable(self.path)} ended while it was read: download it again")
        dtype = getattr(torch, STORED[entry.dtype].torch)
        return torch.frombuffer(buffer, dtype=dtype).reshape(entry.shape)

    def check(self, tensor: LoraTensor) -> None:
        """Raise BadRequest for NaN and infinite values, BundleError as `tensor` does."""
        values = self.tensor(tensor)
        # The extremes are NaN where a value is; they take a tenth of the time of looking at each.
        if values.numel() and not torch.stack(values.aminmax()).isfinite().all():
            raise BadRequest(
                f"{printable(self.path)}: {printable(tensor.key)} has NaN or infinite values: the "
                f"LoRA is damaged, download it again or take an earlier one"
            )

    def number(self, tensor: LoraTensor) -> float:
        """An alpha. Raises BadRequest when it is no finite number."""
        entry = tensor.entry
        if entry.shape not in ((), (1,)) or entry.dtype not in _SCALARS:
            raise BadRequest(
                f"{printable(self.path)}: {printable(tensor.key)} is {entry.dtype} "
                f"{list(entry.shape)}, expected one number as alpha"
            )
        self.check(tensor)
        return float(self.tensor(tensor).item())


def read_lora(file: Path) -> Lora:
    """Open a safetensors file as a LoRA: LoRA, DoRA, LoKr, LoHa, and differences.

    Raises BundleError for a file that is damaged, or no safetensors file, and BadRequest for one of
    a kind that is not read, of both experts of an A14B, or with damaged alphas in its header.
    """
    pinned = pin(file)
    with pinned.opened() as descriptor:
        entries, metadata = read_header(descriptor), read_metadata(descriptor)
    name = printable(file)
    for key in entries:
        if what := other_kind(key):
            raise BadRequest(f"{name} {what}, which is not read: {printable(key)}")
    second = [key.startswith(SECOND_EXPERT) for key in entries]
    if any(second) and not all(second):
        raise BadRequest(
            f"{name} has a LoRA for each of two experts ({SECOND_EXPERT}* and others): write two "
            f"files, one for each"
        )
    tensors = tuple(_tensor(key, entry) for key, entry in entries.items())
    return Lora(pinned, tensors, _alphas(metadata, name, SECOND_EXPERT if any(second) else ""))


def _tensor(key: str, entry: TensorEntry) -> LoraTensor:
    module, role = split(key) or ("", "")
    return LoraTensor(key, module, role, entry)


def _alphas(metadata: Mapping[str, Any], file: str, expert: str) -> Alphas | None:
    """The alphas in the header; None where there are none. Raises BadRequest for damaged ones."""
    if _METADATA not in metadata:
        return None
    try:
        found = json.loads(metadata[_METADATA])
        for prefix in (expert or "transformer.", ""):
            if f"{prefix}lora_alpha" in found:
                return _of_config({key: found.get(f"{prefix}{key}") for key in _USED})
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise BadRequest(
            f"{file} has damaged {_METADATA} in its header ({printable(error)}): write it again, "
            f"or without"
        ) from error
    return None


_USED = ("lora_alpha", "alpha_pattern", "use_rslora")  # a rank is that of the tensors


def _of_config(config: Mapping[str, Any]) -> Alphas:
    """The alphas of a LoraConfig of PEFT. Raises ValueError for what it cannot hold."""
    patterns = config["alpha_pattern"] or {}
    exceptions = {
        _literal(pattern): (place, _number(alpha))
        for place, (pattern, alpha) in enumerate(patterns.items())
    }
    return Alphas(_number(config["lora_alpha"]), exceptions, bool(config["use_rslora"]))


def _literal(pattern: str) -> str:
    """A module's name; PEFT takes it as a regular expression, and those are refused."""
    text = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
    if not all(c.isalnum() or c in "._" for c in text):
        raise ValueError(f"alpha_pattern {pattern!r} is no module's name")
    return text


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r:.50} is no alpha")
    return float(value)
