"""What a bundle's engine needs of a GPU, and how it is opened there so that all around it fits."""

import warnings
from collections.abc import Mapping
from dataclasses import replace

from wanexport.runtime.bundle.manifest import VAE, EngineRecord, Manifest
from wanexport.runtime.bundle.pinned_file import PinnedFile
from wanexport.runtime.bundle.tensorfile import TensorEntry, read_header
from wanexport.runtime.bundle.vae_signature import vae_weights_layout
from wanexport.runtime.engines.engine import EngineOptions
from wanexport.runtime.engines.layer_parts import parts_of
from wanexport.runtime.errors import WanExportWarning
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.gpu_fit import (
    Fit,
    Needs,
    activation_bytes,
    fit,
    fit_blocks,
    state_bytes,
    with_pieces,
)
from wanexport.runtime.parts.placement import PUBLISHED_BYTES
from wanexport.runtime.parts.vae_choice import best_first
from wanexport.runtime.program import Program
from wanexport.runtime.vae_config import VaeConfig
from wanexport.runtime.vae_memory import needed_bytes

# The VAEs of Wan2.1 and Wan2.2 by their latent channels, where a bundle has no engine of one.
_VAES = {16: VaeConfig(16, 96, 96, False), 48: VaeConfig(48, 160, 256, True)}
# What decoding takes on a GPU, of `needed_bytes`: measured on an H200, 1.9 to 2.2 and 1.4.
_ENGINE_PEAK, _EAGER_PEAK = 2.2, 1.5
_TILE = 256  # pixels


def needs_of(
    program: Program, entries: Mapping[str, TensorEntry], dtype: str, geometry: Geometry
) -> Needs:
    """What an AOTInductor engine of one expert needs, with its VAE in eager PyTorch.

    entries are those of its weights file. All is estimated but the parameters.
    """
    parts = parts_of(entries, program)
    shapes = {name: entry.shape for name, entry in entries.items()}
    latent = program.output.shape
    sizes = _VAES.get(latent[1])
    return Needs(
        rest=parts.rest.size,
        layer=parts.layer_bytes,
        layers=len(parts.layers),
        activations=activation_bytes(program, shapes, dtype),
        vae=_eager(sizes, geometry) if sizes else 0,
        tiles=_eager(sizes, replace(geometry, height=_TILE, width=_TILE)) if sizes else 0,
        text=PUBLISHED_BYTES["text_encoder"],
        state=state_bytes(program, dtype),
    )


def needs_of_engine(
    manifest: Manifest, record: EngineRecord, entries: Mapping[str, TensorEntry]
) -> Needs:
    """The same of a bundle's engine: with what its proof measured, and the bundle's own VAE."""
    needs = needs_of(record.program, entries, record.dtype, record.geometry)
    measured, vae = record.proof.get("peak_bytes"), _vae_engine(manifest, record)
    return replace(
        needs,
        experts=max(1, len(manifest.experts)),
        activations=with_pieces(measured) if measured else needs.activations,
        vae=needs.vae if vae is None else _decoding_of(vae),
    )


def fit_options(
    manifest: Manifest,
    record: EngineRecord,
    files: Mapping[str, PinnedFile],
    options: EngineOptions,
    device: str,
) -> EngineOptions:
    """The options with what they leave open of how weights are held on a GPU.

    files are those of the weights by expert. Says aloud when the engine is not held whole. Where
    nothing fits, it is for the opening to say what lacks.
    """
    from wanexport.runtime.engines.device import gpu_or_cpu, room_on
    from wanexport.runtime.engines.device_weights import is_resident

    if options.offload == "experts" or options.resident_blocks is not None:  # all is said
        return options
    place = gpu_or_cpu(device)
    room = room_on(place)
    first = next(iter(files.values()))
    with first.opened():
        needs = needs_of_engine(manifest, record, read_header(first.path))
    if options.offload == "blocks":
        found = fit_blocks(needs, room)
        return replace(options, resident_blocks=found.resident_blocks if found else 0)
    by_content = {file.identity: file for file in files.values()}
    shared = sum(f.identity.size for f in by_content.values() if is_resident(f, place))
    needs = replace(needs, experts=len(by_content))
    found = fit(needs, room + shared)
    if found is not None and found.offload == "blocks":
        found = fit_blocks(needs, room)
    if found is None or found.offload is None:
        return options
    size = sum(file.identity.size for file in by_content.values())
    _tell(found, needs, f"exceed the {room / 1e9:.1f} GB that {place} has free", size)
    return replace(options, offload=found.offload, resident_blocks=found.resident_blocks)


def _tell(found: Fit, needs: Needs, why: str, size: int) -> None:
    """Say aloud that weights of `size` bytes are not all on the GPU."""
    running = needs.activations + needs.state
    held = "one expert stays at a time"
    if found.offload == "blocks":
        held = f"{found.resident_blocks} of {needs.layers} blocks stay, the others are streamed"
    warnings.warn(
        f"{size / 1e9:.1f} GB of weights, and {running / 1e9:.1f} GB to run them, {why}: "
        f"{held} (--offload {found.offload})",
        WanExportWarning,
        stacklevel=3,
    )


def _vae_engine(manifest: Manifest, record: EngineRecord) -> EngineRecord | None:
    """The engine of the VAE that decodes a denoiser's videos on a GPU."""
    size = (record.geometry.height, record.geometry.width)
    fitting = [
        engine
        for engine in manifest.engines
        if engine.role == VAE
        and engine.target.get("device") == "cuda"
        and (engine.geometry.height, engine.geometry.width) == size
        and not engine.unfamiliar
    ]
    return min(fitting, key=lambda e: best_first(e, record.geometry.frames), default=None)


def _decoding_of(engine: EngineRecord) -> int:
    """Bytes that an engine of a VAE takes to decode, its weights included."""
    sizes: VaeConfig = engine.details.sizes
    needed = needed_bytes(sizes, engine.geometry, engine.dtype, "decode", sizes.decode_chunk)
    peak = engine.proof.get("decode_peak_bytes") or _ENGINE_PEAK * needed
    return round(peak) + _weights(sizes, engine.dtype)


def _eager(sizes: VaeConfig, geometry: Geometry) -> int:
    """Bytes that diffusers' VAE in fp32 takes to decode, its weights included."""
    needed = needed_bytes(sizes, geometry, "fp32", "decode", 1)
    return round(_EAGER_PEAK * needed) + _weights(sizes, "fp32")


def _weights(sizes: VaeConfig, dtype: str) -> int:
    return sum(entry.size for entry in vae_weights_layout(sizes, dtype)[1].values())
