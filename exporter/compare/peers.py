"""What `compare` holds an engine against: the same model, eager, from other tensors or code."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from wanexport.exporter.model_source import resolve
from wanexport.exporter.reference.diffusers import DiffusersEngine
from wanexport.exporter.reference.eager import EagerEngine
from wanexport.graphs.checkpoint import SourceTensor
from wanexport.graphs.config import PRESETS
from wanexport.graphs.weights import CheckpointWeights, bundle_tensors
from wanexport.runtime.bundle.check import check_content
from wanexport.runtime.bundle.manifest import EngineRecord, Manifest
from wanexport.runtime.bundle.signature import parameter_shapes
from wanexport.runtime.denoiser import Denoiser
from wanexport.runtime.engines.engine import Engine
from wanexport.runtime.errors import WanExportError, needing_extra
from wanexport.runtime.machine.memory import free_bytes
from wanexport.runtime.wan_config import WanConfig

IMPLEMENTATIONS = ("graph", "diffusers")

Key = tuple[str, str]  # implementation and dtype
Tensors = Mapping[str, Mapping[str, SourceTensor]]  # of each expert, by official name


@dataclass(frozen=True)
class Peers:
    """Eager denoisers with the tensors that the engine's weights were rounded from, rounded alike.

    `unrounded` is the reference in fp32 with these tensors as they are, where that differs.
    """

    eager: dict[Key, Denoiser]
    unrounded: Denoiser | None


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


def open_peers(
    manifest: Manifest,
    record: EngineRecord,
    tensors: Tensors,
    keys: Collection[Key],
    *,
    unrounded: str | None,
) -> Peers:
    """Open denoisers; unrounded names the implementation of that peer, None for none.

    Raises WanExportError when diffusers' models do not fit in memory.
    """
    config = manifest.config
    wanted = [*keys, *([(unrounded, "fp32")] if unrounded else [])]
    device = record.target["device"]
    needed, free = _bytes(config, wanted, len(tensors)), free_bytes(device)
    if needed > free and any(name == "diffusers" for name, _ in wanted):
        raise WanExportError(
            f"diffusers' model would take {needed / 1e9:.1f} GB of {free / 1e9:.1f} GB free: "
            f"compare with our graph, which streams its weights"
        )

    def engine(key: Key, own: Mapping[str, SourceTensor], rounded: str) -> Engine:
        name, dtype = key
        if name == "diffusers":
            return DiffusersEngine(
                config, record.geometry, dtype, own, rounded=rounded, device=device
            )
        return EagerEngine(
            config,
            record.geometry,
            dtype,
            own,
            rounded=rounded,
            resident=needed < free / 2,
            device=device,
        )

    def peer(key: Key, rounded: str) -> Denoiser:
        return Denoiser(record, {e: engine(key, own, rounded) for e, own in tensors.items()})

    return Peers(
        eager={key: peer(key, record.dtype) for key in keys},
        unrounded=peer((unrounded, "fp32"), "fp32") if unrounded else None,
    )


def _bytes(config: WanConfig, keys: Collection[Key], experts: int) -> int:
    """Memory of all parameters of such denoisers, were they resident."""
    parameters = sum(prod(shape) for shape in parameter_shapes(config).values())
    return parameters * experts * sum(4 if dtype == "fp32" else 2 for _, dtype in keys)


def check_implementation(name: str) -> None:
    """Raise WanExportError when there is no such implementation, or it is not installed."""
    if name not in IMPLEMENTATIONS:
        expected = ", ".join(IMPLEMENTATIONS)
        raise WanExportError(f"unknown reference {name!r}: expected one of {expected}")
    if name == "diffusers":
        with needing_extra("diffusers", "this reference"):
            from diffusers import WanTransformer3DModel  # noqa: F401


def tensors_of_bundle(bundle: Path, manifest: Manifest, record: EngineRecord) -> Tensors:
    """The tensors that the engine reads, from files checked whole: eager reads the same ones.

    Raises WanExportError when a file is missing or was altered.
    """
    names = {name: name for name in parameter_shapes(manifest.config)}
    return {
        weights.expert: bundle_tensors(check_content(bundle, weights.file).path, names)
        for weights in manifest.weights_of(record.dtype)
    }


def tensors_of_checkpoint(model: str | Path, manifest: Manifest) -> Tensors:
    """The tensors of the checkpoint that a bundle came from.

    Raises WanExportError when it is none, or of another model than the bundle's.
    """
    model = str(model)
    if model.lower() in PRESETS and not Path(model).exists():
        raise WanExportError(f"{model} is a preset: pass -m a checkpoint's folder or hub id")
    source = resolve(model, None, expert_alone=not manifest.experts)
    if (source.config, source.experts) != (manifest.config, manifest.experts):
        raise WanExportError(
            f"{model} is another model ({source.name}) than the bundle's ({manifest.model}): "
            f"pass -m the checkpoint that it was built from"
        )
    return {
        expert: weights.tensors
        for expert, weights in source.weights.items()
        if isinstance(weights, CheckpointWeights)
    }
