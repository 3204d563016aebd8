"""Whether an engine's record is what its model and geometry make it.

A record's numbers size buffers and calls of machine code, which checks none of them. So they are
derived anew, and an engine whose record says otherwise is never opened.
"""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from wanexport.runtime.bundle.details import KINDS
from wanexport.runtime.bundle.manifest import (
    BASE,
    DENOISER,
    ROLES,
    VAE,
    EngineRecord,
    Manifest,
    decode_engine,
    engine_label,
)
from wanexport.runtime.bundle.signature import layout_sha256, program_of
from wanexport.runtime.bundle.vae_signature import vae_layout_sha256
from wanexport.runtime.decode import decode
from wanexport.runtime.dtypes import PRECISIONS
from wanexport.runtime.errors import BundleError, printable
from wanexport.runtime.family import FAMILIES, family_of
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.program import Program, TensorSpec
from wanexport.runtime.wan_config import EXPERTS, WanConfig
from wanexport.runtime.wan_vae import vae_program


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
        return _of_later(manifest, engine.name, f"has {unfamiliar}")
    if reason := mismatch(manifest.config, engine) or _lacks(manifest, engine):
        size = engine.geometry.options
        kind = f"--backend {engine.backend} --dtype {engine.dtype}"
        if engine.role == VAE:
            kind = f"--parts --vae-dtype {engine.dtype}"
        return (
            f"engine {engine.name} cannot be used: {reason}; build it again with wanexport build "
            f"{kind} {size} -o {bundle}"
        )
    return ""


def unread_name(data: Mapping[str, Any]) -> str:
    """How messages call an engine whose record cannot be read, by what it says of itself."""
    backend, dtype = (printable(data.get(name, "?"), 30) for name in ("backend", "dtype"))
    target = data.get("target")
    role = VAE if data.get("role") == VAE else DENOISER
    label = engine_label(backend, dtype, target if isinstance(target, dict) else {}, role)
    with suppress(KeyError, TypeError, ValueError):
        geometry: Geometry = decode(Geometry, data["geometry"], "")
        label = f"{geometry.name}/{label}"
    return printable(label, 100)


def engine_names(manifest: Manifest) -> list[str]:
    """What every engine of a bundle is called, those that cannot be read last."""
    return [engine.name for engine in manifest.engines] + [*map(unread_name, manifest.unread)]


def unread_unfamiliar(data: Mapping[str, Any]) -> str:
    """What kind an engine whose record cannot be read is of, in words; empty for a known one."""
    known = {"role": tuple(ROLES), "backend": tuple(KINDS), "dtype": PRECISIONS}
    for field, values in known.items():
        stated = data.get(field)
        if isinstance(stated, str) and stated not in values:
            return f"{field} {printable(stated, 30)}"
    return ""


def why_unread(bundle: Path, manifest: Manifest, data: Mapping[str, Any]) -> str:
    """One line with the cure for an engine whose record cannot be read."""
    name = unread_name(data)
    if unfamiliar := unread_unfamiliar(data):
        return _of_later(manifest, name, f"has {unfamiliar}")
    reason = "its record is of another form"
    try:
        decode_engine(data, "its record")
    except (TypeError, ValueError) as error:
        reason = printable(error, 300)
    return (
        f"engine {name} cannot be used: {reason}; install the wanexport that built it, "
        f"{manifest.wanexport}, or build it again with wanexport build -o {bundle}"
    )


def _of_later(manifest: Manifest, name: str, what: str) -> str:
    return (
        f"engine {name} {what}, which this wanexport does not know: install the one that built "
        f"it, wanexport {manifest.wanexport}, or build another engine"
    )


def _lacks(manifest: Manifest, engine: EngineRecord) -> str:
    """What a model with or without experts must have beside an engine of it."""
    if engine.role == VAE:
        found = manifest.weights_of(engine.layout, BASE, VAE)
        return "" if found else "the bundle lacks weights of its VAE"
    boundary, experts = engine.sampling.boundary, manifest.experts
    if (boundary is not None) != bool(experts) or (boundary is not None and not 0 < boundary < 1):
        return f"boundary {boundary} does not fit {len(experts)} experts"
    needed, sets = set(experts or ("",)), manifest.sets(engine.layout).values()
    if any(needed <= records.keys() for records in sets):
        return ""
    return "the bundle lacks weights of an expert"


def mismatch(config: WanConfig, engine: EngineRecord) -> str:
    """What an engine of a known kind records otherwise than config and geometry make it."""
    if engine.fault:
        return engine.fault
    if engine.family != config.family:
        return f"it is of family {engine.family}, the model of {config.family}"
    if engine.role == VAE:
        return _vae_mismatch(config, engine)
    stride, expected = engine.geometry.spatial_stride, family_of(config).vae.spatial_stride
    if stride != expected:
        return f"it is for a VAE of stride {stride}, the model's has {expected}"
    if bool(engine.geometry.chunk) != family_of(config).is_causal:
        return f"its geometry {engine.geometry.name} is of another kind than family {config.family}"
    program = program_of(config, engine.geometry)
    if KINDS[engine.backend].is_whole:
        program = program.whole()
    if differing := _difference(engine.program, program):
        return differing
    if engine.layout != layout_sha256(config, engine.dtype):
        return "it is for weights of another layout than this wanexport gives the model"
    kernels = getattr(engine.details, "attention", None)  # a TensorRT plan has none to choose
    if isinstance(kernels, dict) and kernels.keys() != program.attention.keys():
        found, needed = ", ".join(kernels) or "none", ", ".join(program.attention)
        return f"it has kernels for attention of kind {found:.60}, the model needs {needed}"
    return ""


def _vae_mismatch(config: WanConfig, engine: EngineRecord) -> str:
    """The same of an engine of the model's VAE."""
    sizes, expected = engine.details.sizes, family_of(config).vae
    found = (sizes.channels, sizes.spatial_stride)
    if found != (expected.channels, expected.spatial_stride):
        return (
            f"it is of a VAE with {found[0]} latent channels and stride {found[1]}, the model's "
            f"has {expected.channels} and {expected.spatial_stride}"
        )
    if engine.geometry.spatial_stride != sizes.spatial_stride:
        return f"its geometry is of stride {engine.geometry.spatial_stride}"
    program = vae_program(sizes, engine.geometry)
    if differing := _difference(engine.program, program):
        return differing
    if engine.layout != vae_layout_sha256(sizes, engine.dtype):
        return "it is for weights of another layout than this wanexport gives the VAE"
    if engine.details.attention.keys() != program.attention.keys():
        return f"it has kernels for attention of kind {', '.join(engine.details.attention):.60}"
    return ""


def _difference(own: Program, model: Program) -> str:
    """What of a recorded Program is not the model's, in words; empty when all is."""
    if list(own.inputs.items()) != list(model.inputs.items()):
        return f"its inputs are {_shown(own.inputs)}, the model takes {_shown(model.inputs)}"
    if own.outputs != model.outputs:
        return f"its output is {_shown(own.outputs)}, the model's {_shown(model.outputs)}"
    if own.attention.keys() != model.attention.keys():
        kinds = ", ".join(own.attention) or "none"
        return f"it has attention of kind {kinds:.60}, the model {', '.join(model.attention)}"
    for call, expected in zip(own.calls, model.calls):
        if call.parameters != expected.parameters:
            pairs = zip(call.parameters, expected.parameters)
            wrong = next((a for a, b in pairs if a != b), f"{len(call.parameters)} of them")
            return f"its {call.name} takes other parameters than the model has, {wrong:.60} for one"
    return "" if own == model else "its calls are not the model's"


def _shown(specs: Mapping[str, TensorSpec]) -> str:
    """Names, shapes and dtypes in few words."""
    shown = ", ".join(
        " ".join([name, str(list(spec.shape)), spec.dtype, getattr(spec, "draw", "")]).strip()
        for name, spec in specs.items()
    )
    return f"{shown:.200}" or "none"
