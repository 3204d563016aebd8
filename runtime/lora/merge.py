"""Merge a stack of LoRAs into a model's weights, one parameter at a time."""

import warnings
from collections import Counter, deque
from collections.abc import Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wanexport.runtime.bundle.check import file_sha256
from wanexport.runtime.bundle.pinned_file import PinnedFile
from wanexport.runtime.errors import BadRequest, WanExportWarning, printable
from wanexport.runtime.lora.fit import Fit, Shapes, Unfit, fit
from wanexport.runtime.lora.given import check_strength
from wanexport.runtime.lora.read import Lora, read_lora
from wanexport.runtime.lora.refuse import refuse_unfit

_THREADS = 8
_LONGEST_LIST = 4000  # characters of the keys that are left out


@dataclass(frozen=True)
class _Layer:
    lora: Lora
    strength: float
    fit: Fit


class LoraStack:
    """LoRAs with their strengths, fitted to a model's parameters; it holds no values.

    They are merged in order, each into what those before it made: so a DoRA takes the norms of the
    running weight, as in ComfyUI (PEFT takes those of the base). Within a file low rank, LoKr, LoHa
    and their magnitudes come before differences, and all are added where several change one
    parameter (in ComfyUI a difference replaces the rest).
    """

    def __init__(
        self, files: Sequence[tuple[Path, float]], shapes: Shapes, *, partial: bool = False
    ) -> None:
        """Open and check the files, every value among them.

        shapes has the model's parameters by official name. With partial, tensors that have no place
        in the model are left out, and listed in `unfit`.
        Raises BadRequest, naming file and tensor, when a LoRA does not fit, is of a kind that is
        not read, or has NaN or infinite values, and for such a strength; BundleError for a file
        that is damaged or cannot be read.
        """
        self.shapes = shapes
        self._layers = tuple(_layer(file, strength, shapes, partial) for file, strength in files)

    @property
    def unfit(self) -> tuple[tuple[Path, Unfit], ...]:
        """The tensors that change nothing, with their files."""
        return tuple(
            (layer.lora.file.path, one) for layer in self._layers for one in layer.fit.unfit
        )

    def changes(self, name: str) -> bool:
        """Whether any LoRA changes this parameter."""
        return any(name in layer.fit.changes for layer in self._layers)

    def merge(self, name: str, base: Tensor) -> Tensor:
        """The parameter with every LoRA merged; base is fp32, on any device, and stays as it is.

        W' = W + strength * (alpha / rank) * up @ down, in fp32, for each LoRA; reads only what
        changes this parameter. Raises BadRequest when the result has NaN or infinite values that
        base has not, BundleError when a file was changed since it was opened.
        """
        assert base.dtype == torch.float32 and tuple(base.shape) == self.shapes[name], name
        merged = base
        for layer in self._layers:
            if changes := layer.fit.changes.get(name):
                with torch.no_grad(), layer.lora.opened() as values:
                    for change in changes:
                        merged = change.applied(merged, layer.strength, values)
        if merged is not base and not merged.isfinite().all() and base.isfinite().all():
            files = ", ".join(printable(layer.lora.file.path) for layer in self._layers)
            raise BadRequest(
                f"{name} becomes NaN or infinite with {files}: a strength is too large, or a LoRA "
                f"is damaged"
            )
        return merged

    def rounded(self, name: str, base: Tensor) -> Tensor:
        """The parameter with every LoRA merged in fp32, rounded once to the dtype of base.

        Raises as `merge` does, and BadRequest for a value that the dtype cannot hold.
        """
        merged = self.merge(name, base.float()).to(base.dtype)
        if not merged.isfinite().all():
            raise BadRequest(
                f"{name} has values beyond {str(base.dtype).removeprefix('torch.')} with the "
                f"LoRAs merged: take a smaller strength, or an engine of another dtype"
            )
        return merged

    @property
    def content(self) -> Hashable:
        """What tells this stack from another, as far as is known without reading it."""
        return tuple((layer.lora.file.identity, layer.strength) for layer in self._layers)

    def describe(self) -> list[dict[str, Any]]:
        """What was merged, for a manifest: of each file its path, hash, strength and counts."""
        return self._described

    @cached_property
    def _described(self) -> list[dict[str, Any]]:
        return [_record(layer) for layer in self._layers]


def open_stacks(
    files: Mapping[str, Sequence[tuple[Path, float]]], shapes: Shapes, *, partial: bool = False
) -> dict[str, LoraStack]:
    """The stack of each expert that has LoRAs; experts with the same ones share it.

    files are by expert. Warns of what was left out with partial. Raises as LoraStack does.
    """
    opened = {
        own: LoraStack(own, shapes, partial=partial) for own in map(tuple, files.values()) if own
    }
    _warn_left_out(opened.values())
    return {expert: opened[tuple(own)] for expert, own in files.items() if own}


def _warn_left_out(stacks: Iterable[LoraStack]) -> None:
    """Warn of the tensors of each file that change nothing, which are listed."""
    keys: dict[Path, dict[str, str]] = {}
    for stack in stacks:
        for path, unfit in stack.unfit:
            keys.setdefault(path, {})[unfit.key] = unfit.reason
    for path, own in keys.items():
        listed = "; ".join(f"{key}: {reason}" for key, reason in own.items())
        warnings.warn(
            f"{printable(path)} has {len(own)} tensors without a place in the model, left out: "
            f"{printable(listed, _LONGEST_LIST)}",
            WanExportWarning,
            stacklevel=4,
        )


def _layer(file: Path, strength: float, shapes: Shapes, partial: bool) -> _Layer:
    """One LoRA, opened and fitted. Raises as LoraStack does."""
    check_strength(file, strength)
    lora = read_lora(file)
    found = fit(lora, shapes)
    refuse_unfit(lora, found, shapes, partial=partial)
    tensors = [t for changes in found.changes.values() for one in changes for t in one.tensors]
    with lora.opened() as values, ThreadPoolExecutor(_THREADS) as pool:
        deque(pool.map(values.check, tensors), maxlen=0)
    return _Layer(lora, strength, found)


def _record(layer: _Layer) -> dict[str, Any]:
    kinds = Counter(change.label for changes in layer.fit.changes.values() for change in changes)
    if layer.fit.alone:
        kinds["alpha alone"] = layer.fit.alone
    return {
        "path": str(layer.lora.file.path),
        "sha256": _sha256(layer.lora.file),
        "strength": layer.strength,
        "changes": dict(sorted(kinds.items())),
        "unused": len(layer.fit.unfit),
    }


def _sha256(file: PinnedFile) -> str:
    """Of the content that was fitted. Raises BundleError when it was changed since."""
    with file.opened():
        return file_sha256(file.path)
