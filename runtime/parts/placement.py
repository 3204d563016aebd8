"""Where the encoders run beside an engine on one GPU: decided once, from sizes.

Nothing here asks what the GPU holds: who opens the parts measures that, and hands it in.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from wanexport.runtime.bundle.manifest import EngineRecord, Manifest
from wanexport.runtime.bundle.signature import parameter_shapes, program_of
from wanexport.runtime.gpu_fit import activation_bytes
from wanexport.runtime.parts.carried import carried_in
from wanexport.runtime.vae_memory import needed_bytes

BESIDE = "beside"  # it stays on the GPU
BEFORE = "before"  # it is there until the prompt, or the picture, is encoded
FIRST = "first"  # it is there until the first prompts are encoded, and then the engine is opened
CPU = "cpu"
# Bytes in 16 bits of what every Wan has: umT5 of 5 680 910 336 parameters, and CLIP's tower.
PUBLISHED_BYTES = {"text_encoder": 11_361_820_672, "image_encoder": 1_261_532_160}
_MARGIN = 1 << 30  # bytes: the workspaces of PyTorch's libraries, and what lies between tensors
_TITLES = {"text_encoder": "the text encoder", "image_encoder": "the image encoder"}
_HOW = {
    BEFORE: "is opened for each new one that it encodes, and freed before the sampling",
    FIRST: "encodes the prompt before the engine is opened",
    CPU: "runs on the CPU, which takes longer",
}


@dataclass(frozen=True)
class Needs:
    """Bytes of GPU memory of an engine and the VAE: weights that stay, and the most of a call."""

    engine: int
    engine_call: int
    vae: int = 0
    vae_call: int = 0


def place_encoders(
    needs: Needs, encoders: Mapping[str, int], free: int, *, keeps_text: bool, may_precede: bool
) -> dict[str, str]:
    """Where each encoder runs, of these bytes, on a GPU with so many free before all is opened.

    keeps_text: whether the text encoder is to stay. may_precede: whether the first prompts are
    known and the engine is not open yet. An encoder that would take memory from a call of the
    engine or of the VAE is freed before it.
    """
    resident = needs.engine + needs.vae + _MARGIN
    call = max(needs.engine_call, needs.vae_call)
    placed: dict[str, str] = {}
    for part, size in encoders.items():
        stays = keeps_text or part != "text_encoder"
        if stays and resident + call + size <= free:
            placed[part] = BESIDE
            resident += size
        elif resident + size <= free:
            placed[part] = BEFORE
        elif part == "text_encoder" and may_precede and size + _MARGIN <= free:
            placed[part] = FIRST
        else:
            placed[part] = CPU
    return placed


def placement_note(part: str, place: str, size: int, needs: Needs, free: int) -> str:
    """One line about an encoder that does not stay beside the engine; empty for one that does."""
    if place == BESIDE:
        return ""
    engine, vae = needs.engine + needs.engine_call, needs.vae + needs.vae_call
    return (
        f"{_TITLES[part]} ({size / 1e9:.1f} GB) {_HOW[place]}: the GPU has {free / 1e9:.1f} GB "
        f"free, of which the engine takes {engine / 1e9:.1f} and the VAE {vae / 1e9:.1f}"
    )


def needs_of(
    manifest: Manifest, engine: EngineRecord, vae: EngineRecord | None, *, one_expert: bool
) -> Needs:
    """What an engine takes, and that of the VAE where the bundle has one.

    one_expert: whether two experts take turns in one buffer. A call of TensorRT is as its plan
    states; that of the others is an estimate.
    """
    sizes = [weights.file.size for weights in manifest.weights_of(engine.layout)]
    sizes = sizes or [file.size for file in engine.files.values()]
    call = engine.build.get("activation_bytes") or activation_bytes(
        program_of(manifest.config, engine.geometry),
        parameter_shapes(manifest.config),
        engine.dtype,
    )
    weights = max(sizes) if one_expert else sum(sizes)
    if vae is None:
        return Needs(weights, call)
    own = vae.details.sizes
    decoding = needed_bytes(own, vae.geometry, vae.dtype, "decode", own.decode_chunk)
    held = sum(w.file.size for w in manifest.weights_of(vae.layout, role=vae.role))
    return Needs(weights, call, held, decoding)


def encoder_bytes(manifest: Manifest, part: str) -> int:
    """What an encoder takes on a GPU: as the bundle carries it, or as every Wan has it."""
    own = carried_in(manifest, part)
    if own is None:
        return PUBLISHED_BYTES[part]
    return own.file.size // (2 if own.dtype == "fp32" else 1)  # it computes in 16 bits there
