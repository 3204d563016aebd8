"""What `compare` holds an engine against: the same model, eager, from other tensors or code."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path

from wanexport.exporter.diffusers_engine import DiffusersEngine
from wanexport.exporter.eager import EagerEngine
from wanexport.exporter.model_source import resolve
from wanexport.graphs.checkpoint import SourceTensor
from wanexport.graphs.config import PRESETS, WanConfig
from wanexport.graphs.signature import parameter_shapes
from wanexport.graphs.weights import CheckpointWeights, bundle_tensors
from wanexport.runtime.denoiser import Denoiser
from wanexport.runtime.errors import WanExportError
from wanexport.runtime.manifest import EngineRecord, Manifest, check_content
from wanexport.runtime.memory import available_bytes

IMPLEMENTATIONS: dict[str, type[EagerEngine | DiffusersEngine]] = {
    "graph": EagerEngine,
    "diffusers": DiffusersEngine,
}

Tensors = Mapping[str, Mapping[str, SourceTensor]]  # of each expert, by official name


@dataclass(frozen=True)
class Peers:
    """Denoisers beside the engine; those that a comparison does not need are left out.

    `exact` is fp32 with the engine's weights, `lower` the same in lower precisions, and `unrounded`
    fp32 with the checkpoint's own tensors where the engine's are rounded.
    """

    exact: Denoiser | None
    lower: dict[str, Denoiser]
    unrounded: Denoiser | None


def open_peers(
    manifest: Manifest,
    record: EngineRecord,
    tensors: Tensors,
    *,
    implementation: str,
    is_checkpoint: bool,
    recorded_dtype: str | None,
) -> Peers:
    """Open what a comparison with this reference needs.

    recorded_dtype is the precision of a recorded reference, None where `exact` is the reference.
    """
    config = WanConfig(**manifest.config)
    lower = {dtype for dtype in (record.dtype, recorded_dtype or "fp32") if dtype != "fp32"}
    wants_exact = bool(lower) or recorded_dtype is None
    wants_unrounded = is_checkpoint and record.dtype != "fp32"
    dtypes = ["fp32"] * (wants_exact + wants_unrounded) + sorted(lower)
    resident = _bytes(config, dtypes, len(tensors)) < available_bytes() / 2

    def peer(dtype: str, rounded: str = record.dtype) -> Denoiser:
        make = IMPLEMENTATIONS[implementation]
        engines = {
            expert: make(config, record.geometry, dtype, own, rounded=rounded, resident=resident)
            for expert, own in tensors.items()
        }
        return Denoiser(record, engines)

    return Peers(
        exact=peer("fp32") if wants_exact else None,
        lower={dtype: peer(dtype) for dtype in lower},
        unrounded=peer("fp32", "fp32") if wants_unrounded else None,
    )


def _bytes(config: WanConfig, dtypes: list[str], experts: int) -> int:
    """Memory of all parameters of such engines, were they resident."""
    parameters = sum(prod(shape) for shape in parameter_shapes(config).values())
    return parameters * experts * sum(4 if dtype == "fp32" else 2 for dtype in dtypes)


def tensors_of_bundle(bundle: Path, manifest: Manifest, record: EngineRecord) -> Tensors:
    """The tensors that the engine reads, from files checked whole: eager reads the same ones.

    Raises WanExportError when a file is missing or was altered.
    """
    names = {name: name for name in parameter_shapes(WanConfig(**manifest.config))}
    return {
        weights.expert: bundle_tensors(check_content(bundle, weights.file), names)
        for weights in manifest.weights_of(record.dtype)
    }


def tensors_of_checkpoint(model: str, manifest: Manifest) -> Tensors:
    """The tensors of the checkpoint that a bundle came from.

    Raises WanExportError when it is none, or of another model than the bundle's.
    """
    if model.lower() in PRESETS and not Path(model).exists():
        raise WanExportError(
            f"{model} is a preset: -m compares with a checkpoint's folder or hub id"
        )
    source = resolve(model, None)
    if (asdict(source.config), source.experts) != (manifest.config, manifest.experts):
        raise WanExportError(
            f"{model} is another model ({source.name}) than the bundle's ({manifest.model}): "
            f"pass -m the checkpoint that it was built from"
        )
    return {
        expert: weights.tensors
        for expert, weights in source.weights.items()
        if isinstance(weights, CheckpointWeights)
    }
