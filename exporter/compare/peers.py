"""What `compare` holds an engine against: the same model, eager, from other tensors or code."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

from wanexport.exporter.model_source import resolve_as
from wanexport.exporter.reference.diffusers import DiffusersEngine
from wanexport.exporter.reference.eager import EagerEngine
from wanexport.graphs.config import PRESETS
from wanexport.graphs.source_tensor import SourceTensor
from wanexport.graphs.torch_file import EMA, GENERATORS, ema_option
from wanexport.graphs.weights import CheckpointWeights, bundle_tensors
from wanexport.runtime.bundle.check import check_content
from wanexport.runtime.bundle.manifest import BASE, EngineRecord, Manifest
from wanexport.runtime.bundle.pinned_file import PinnedFile
from wanexport.runtime.bundle.signature import parameter_shapes
from wanexport.runtime.denoiser import Denoiser
from wanexport.runtime.errors import BadRequest, needing_extra, printable
from wanexport.runtime.load import find_weights
from wanexport.runtime.machine.memory import free_bytes
from wanexport.runtime.wan_config import WanConfig

IMPLEMENTATIONS = ("graph", "diffusers")

Key = tuple[str, str]  # implementation and dtype
EXACT: Key = ("graph", "fp32")
Tensors = Mapping[str, Mapping[str, SourceTensor]]  # of each expert, by official name


@dataclass(frozen=True)
class Other:
    """Another engine as the reference, and our graph in eager PyTorch with that engine's weights,
    where these are rounded otherwise: in its precision and in fp32. weights are its files."""

    denoiser: Denoiser
    weights: Mapping[str, PinnedFile]
    eager: dict[Key, Denoiser]


@dataclass(frozen=True)
class Peers:
    """Eager denoisers with the tensors that the engine's weights were rounded from, rounded alike.

    `unrounded` is the reference in fp32 with these tensors as they are, where that differs, and
    `other` an engine that is the reference.
    """

    eager: dict[Key, Denoiser]
    unrounded: Denoiser | None
    other: Other | None = None

    @property
    def of_other(self) -> dict[Key, Denoiser]:
        """The eager denoisers with the weights of the other engine."""
        return self.eager if self.other is None or not self.other.eager else self.other.eager


def needed_peers(implementation: str, dtype: str, recorded_dtype: str | None) -> set[Key]:
    """The denoisers that comparing an engine of this dtype takes.

    The reference is `implementation` in fp32 unless there is a recorded one, and noise is measured
    between a lower precision and fp32 of one implementation: our graph for the engine's, and
    `implementation` for a recording's. So no fault of our graph can widen its own gate.
    """
    noisy = {("graph", dtype), (implementation, recorded_dtype or "fp32")}
    keys = {key for key in noisy if key[1] != "fp32"}
    keys |= {(name, "fp32") for name, _ in keys}
    return keys if recorded_dtype else keys | {(implementation, "fp32")}


@dataclass(frozen=True)
class Placed:
    """What every peer of a comparison has in common: the model, the engine, its device, tensors."""

    manifest: Manifest
    record: EngineRecord
    device: str
    tensors: Tensors


def open_peers(placed: Placed, keys: Collection[Key], *, unrounded: str | None) -> Peers:
    """Open denoisers; unrounded names the implementation of that peer, None for none.

    Raises BadRequest when diffusers' models do not fit in memory.
    """
    wanted = [*keys, *([(unrounded, "fp32")] if unrounded else [])]
    needed = _bytes(placed.manifest.config, wanted, len(placed.tensors))
    free = free_bytes(placed.device)
    if needed > free and any(name == "diffusers" for name, _ in wanted):
        raise BadRequest(
            f"diffusers' model would take {needed / 1e9:.1f} GB of {free / 1e9:.1f} GB free: "
            f"compare with our graph, which streams its weights"
        )
    open_peer = partial(_open_peer, placed, resident=needed < free / 2)
    return Peers(
        eager={key: open_peer(key, placed.record.dtype) for key in keys},
        unrounded=open_peer((unrounded, "fp32"), "fp32") if unrounded else None,
    )


def _open_peer(placed: Placed, key: Key, rounded: str, *, resident: bool) -> Denoiser:
    """The denoiser of one peer, with an engine for each expert."""
    config, geometry = placed.manifest.config, placed.record.geometry
    name, dtype = key
    make = DiffusersEngine if name == "diffusers" else partial(EagerEngine, resident=resident)
    return Denoiser(
        placed.record,
        {
            expert: make(config, geometry, dtype, own, rounded=rounded, device=placed.device)
            for expert, own in placed.tensors.items()
        },
    )


def _bytes(config: WanConfig, keys: Collection[Key], experts: int) -> int:
    """Memory of all parameters of such denoisers, were they resident."""
    parameters = sum(prod(shape) for shape in parameter_shapes(config).values())
    return parameters * experts * sum(4 if dtype == "fp32" else 2 for _, dtype in keys)


def check_implementation(name: str) -> None:
    """Raise BadRequest for an implementation that there is not, or that is not installed."""
    if name not in IMPLEMENTATIONS:
        expected = ", ".join(IMPLEMENTATIONS)
        raise BadRequest(f"unknown reference {name!r}: expected one of {expected}")
    if name == "diffusers":
        with needing_extra("diffusers", "this reference"):
            from diffusers import WanTransformer3DModel  # noqa: F401


def tensors_of_bundle(
    bundle: Path, manifest: Manifest, record: EngineRecord, weights: str | Path | None
) -> Tensors:
    """The tensors that the engine reads with these weights: eager reads the same ones.

    The bundle's own files are checked whole. Raises WanExportError when a file is missing, was
    altered or is none of the engine's layout.
    """
    names = {name: name for name in parameter_shapes(manifest.config)}
    files = find_weights(bundle, record, weights, manifest).files
    own = {bundle / known.file.path: known.file for known in manifest.weights.values()}
    for file in files.values():
        if file.path in own:
            check_content(bundle, own[file.path])
    return {expert: bundle_tensors(file.path, names) for expert, file in files.items()}


def tensors_of_checkpoint(
    model: str | Path,
    low_noise: str | Path | None,
    ema: bool | None,
    manifest: Manifest,
    generator: str,
) -> Tensors:
    """The tensors of the checkpoint that a bundle came from, with low_noise of both its experts.

    ema is as in `build`, and generator what `generator_of` gives. Raises BadRequest when it is
    none, of another model than the bundle's, or another of a training's models was read.
    """
    model = str(model)
    if model.lower() in PRESETS and not Path(model).exists():
        raise BadRequest(f"{model} is a preset: pass -m a checkpoint's folder or hub id")
    source = resolve_as(manifest, model, low_noise, ema)
    read, option = source.record.get("generator", ""), ema_option(generator == EMA)
    if generator and read and read != generator:
        raise BadRequest(
            f"the bundle's weights were read from {generator}, and -m reads {read} of "
            f"{printable(model)}: pass {option}, and -m a file with {generator}"
        )
    return {
        expert: weights.tensors
        for expert, weights in source.weights.items()
        if isinstance(weights, CheckpointWeights)
    }


def generator_of(manifest: Manifest, record: EngineRecord, weights: str | Path | None) -> str:
    """Which of a training's models a weights set was read from; empty where it is no such, or
    another tool or version made it."""
    name = BASE if weights is None else str(weights)
    sources = [part.source for part in manifest.weights_of(record.layout, name)]
    stated = [source.get("generator") for source in sources]
    return next((known for known in GENERATORS.values() if known in stated), "")


def refuse_merged(manifest: Manifest, record: EngineRecord, weights: str | Path | None) -> None:
    """Raise BadRequest when LoRAs were merged into a weights set, which no checkpoint has."""
    name = BASE if weights is None else str(weights)
    if any("lora" in part.source for part in manifest.weights_of(record.layout, name)):
        raise BadRequest(
            f"LoRAs were merged into weights set {name}, and -m has them not: leave -m out, and "
            f"the reference takes the set's own tensors"
        )
