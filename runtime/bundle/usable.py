"""Whether an engine's record is what its model and geometry make it.

A record's numbers size buffers and calls of machine code, which checks none of them. So they are
derived anew, and an engine whose record says otherwise is never opened.
"""

from collections.abc import Mapping
from pathlib import Path

from wanexport.runtime.bundle.manifest import EngineRecord, Manifest
from wanexport.runtime.bundle.signature import layout_sha256, program_of
from wanexport.runtime.errors import BundleError
from wanexport.runtime.family import FAMILIES, family_of
from wanexport.runtime.program import Program, TensorSpec
from wanexport.runtime.wan_config import EXPERTS, WanConfig


def check_usable(bundle: Path, manifest: Manifest, engine: EngineRecord) -> None:
    """Raise BundleError when this version cannot use the engine, whatever the machine."""
    if reason := why_unusable(bundle, manifest, engine):
        raise BundleError(reason)


def why_unusable(bundle: Path, manifest: Manifest, engine: EngineRecord) -> str:
    """One line with the cure when this version cannot use the engine; empty when it can."""
    unfamiliar = engine.unfamiliar
    if not unfamiliar and set(manifest.experts) - set(EXPERTS):
        unfamiliar = f"experts {' and '.join(manifest.experts)}"
    if not unfamiliar and manifest.config.family not in FAMILIES:
        unfamiliar = f"family {manifest.config.family}"
    if unfamiliar:
        return (
            f"engine {engine.name} has {unfamiliar}, which this wanexport does not know: install "
            f"the one that built it, wanexport {manifest.wanexport}, or build another engine"
        )
    if reason := mismatch(manifest.config, engine) or _lacks(manifest, engine):
        geometry = engine.geometry
        size = f"{geometry.height}x{geometry.width}"
        return (
            f"engine {engine.name} cannot be used: {reason}; build it again with wanexport build "
            f"--backend {engine.backend} --dtype {engine.dtype} "
            f"--resolution {size} --frames {geometry.frames} -o {bundle}"
        )
    return ""


def _lacks(manifest: Manifest, engine: EngineRecord) -> str:
    """What a model with or without experts must have beside an engine of it."""
    boundary, experts = engine.sampling.boundary, manifest.experts
    if (boundary is not None) != bool(experts) or (boundary is not None and not 0 < boundary < 1):
        return f"boundary {boundary} does not fit {len(experts)} experts"
    served = {expert for records in manifest.sets(engine.layout).values() for expert in records}
    return "" if served >= set(experts or ("",)) else "the bundle lacks weights of an expert"


def mismatch(config: WanConfig, engine: EngineRecord) -> str:
    """What an engine of a known kind records otherwise than config and geometry make it."""
    if engine.fault:
        return engine.fault
    if engine.family != config.family:
        return f"it is of family {engine.family}, the model of {config.family}"
    stride, expected = engine.geometry.spatial_stride, family_of(config).vae.spatial_stride
    if stride != expected:
        return f"it is for a VAE of stride {stride}, the model's has {expected}"
    program = program_of(config, engine.geometry)
    if len(engine.program.calls) < len(program.calls):
        program = program.whole()
    if differing := _difference(engine.program, program):
        return differing
    if engine.layout != layout_sha256(config, engine.dtype):
        return "it is for weights of another layout than this wanexport gives the model"
    kernels = getattr(engine.details, "attention", {})
    if isinstance(kernels, dict) and kernels.keys() != program.attention.keys():
        found, needed = ", ".join(kernels) or "none", ", ".join(program.attention)
        return f"it has kernels for attention of kind {found:.60}, the model needs {needed}"
    return ""


def _difference(own: Program, model: Program) -> str:
    """What of a recorded Program is not the model's, in words; empty when all is."""
    if list(own.inputs.items()) != list(model.inputs.items()):
        return f"its inputs are {_shown(own.inputs)}, the model takes {_shown(model.inputs)}"
    if own.outputs != model.outputs:
        return f"its output is {_shown(own.outputs)}, the model's {_shown(model.outputs)}"
    for call, expected in zip(own.calls, model.calls):
        if call.parameters != expected.parameters:
            pairs = zip(call.parameters, expected.parameters)
            wrong = next((a for a, b in pairs if a != b), f"{len(call.parameters)} of them")
            return f"its {call.name} takes other parameters than the model has, {wrong:.60} for one"
    return "" if own == model else "its calls are not the model's"


def _shown(specs: Mapping[str, TensorSpec]) -> str:
    """Names, shapes and dtypes in few words."""
    shown = ", ".join(f"{name} {list(spec.shape)} {spec.dtype}" for name, spec in specs.items())
    return f"{shown:.200}" or "none"
