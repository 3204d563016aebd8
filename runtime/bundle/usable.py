"""Whether an engine's record is what its model and geometry make it.

A record's numbers size buffers and calls of machine code, which checks none of them. So they are
derived anew, and an engine whose record says otherwise is never opened.
"""

from collections.abc import Mapping
from pathlib import Path

from wanexport.runtime.bundle.manifest import EngineRecord, Manifest, TensorSpec
from wanexport.runtime.bundle.signature import (
    input_shapes,
    key_lengths,
    region_parameters,
    weights_header_sha256,
)
from wanexport.runtime.errors import WanExportError
from wanexport.runtime.wan_config import EXPERTS, WanConfig


def check_usable(bundle: Path, manifest: Manifest, engine: EngineRecord) -> None:
    """Raise WanExportError when this version cannot use the engine, whatever the machine."""
    if reason := why_unusable(bundle, manifest, engine):
        raise WanExportError(reason)


def why_unusable(bundle: Path, manifest: Manifest, engine: EngineRecord) -> str:
    """One line with the cure when this version cannot use the engine; empty when it can."""
    unfamiliar = engine.unfamiliar
    if not unfamiliar and set(manifest.experts) - set(EXPERTS):
        unfamiliar = f"experts {' and '.join(manifest.experts)}"
    if unfamiliar:
        return (
            f"engine {engine.name} has {unfamiliar}, which this wanexport does not know: install "
            f"the one that built it, wanexport {manifest.wanexport}, or build another engine"
        )
    if reason := mismatch(manifest.config, engine):
        geometry = engine.geometry
        size = f"{geometry.height}x{geometry.width}"
        return (
            f"engine {engine.name} cannot be used: {reason}; build it again with wanexport build "
            f"--backend {engine.backend} --dtype {engine.dtype} "
            f"--resolution {size} --frames {geometry.frames} -o {bundle}"
        )
    return ""


def mismatch(config: WanConfig, engine: EngineRecord) -> str:
    """What an engine of a known kind records otherwise than config and geometry make it."""
    stride = engine.geometry.spatial_stride
    if stride != config.spatial_stride:
        return f"it is for a VAE of stride {stride}, the model's has {config.spatial_stride}"
    shapes = input_shapes(config, engine.geometry)
    expected = {name: TensorSpec(shape) for name, shape in shapes.items()}
    if list(engine.inputs.items()) != list(expected.items()):
        return f"its inputs are {_shown(engine.inputs)}, the model takes {_shown(expected)}"
    if engine.output != expected["latent"]:
        output, latent = _shown({"output": engine.output}), _shown({"output": expected["latent"]})
        return f"it has {output}, the model {latent}"
    if engine.weights_header_sha256 != weights_header_sha256(config, engine.dtype):
        return "it is for weights of another layout than this wanexport gives the model"
    return _region_mismatch(config, engine) if engine.backend == "aoti" else ""


def _region_mismatch(config: WanConfig, engine: EngineRecord) -> str:
    """What of an AOTInductor engine's calls differs from what its regions take."""
    for region, names in region_parameters(config).items():
        own = engine.parameters[region]
        if own != names:
            wrong = next((a for a, b in zip(own, names) if a != b), f"{len(own)} of {len(names)}")
            return f"its {region} takes other parameters than the model has, {wrong:.60} for one"
    lengths = {str(length) for length in key_lengths(config, engine.geometry)}
    if engine.attention.keys() != lengths:
        found, needed = ", ".join(engine.attention) or "none", ", ".join(sorted(lengths))
        return f"it has attention to {found:.60} keys, the model to {needed}"
    return ""


def _shown(specs: Mapping[str, TensorSpec]) -> str:
    """Names, shapes and dtypes in few words."""
    shown = ", ".join(f"{name} {list(spec.shape)} {spec.dtype}" for name, spec in specs.items())
    return f"{shown:.200}" or "none"
