"""Where the encoders run beside an engine on one GPU: decided once, from sizes.

Nothing here asks what the GPU holds: who opens the parts measures that, and hands it in.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from wanexport.runtime.bundle.manifest import EngineRecord, Manifest
from wanexport.runtime.bundle.signature import parameter_shapes, program_of, weights_layout
from wanexport.runtime.engines.layer_parts import parts_of
from wanexport.runtime.gpu_fit import Needs as ModelNeeds
from wanexport.runtime.gpu_fit import activation_bytes, state_bytes, streamed_bytes, with_pieces
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
    """Bytes of GPU memory of an engine and the VAE: weights that stay, and the most of a call.

    `state` is what a session keeps, as a causal model's cache. `blocks` says how many blocks are
    among the engine's weights where the others are streamed.
    """

    engine: int
    engine_call: int
    vae: int = 0
    vae_call: int = 0
    state: int = 0
    blocks: str = ""

    @property
    def resident(self) -> int:
        """What stays, with the margin."""
        return self.engine + self.state + self.vae + _MARGIN

    @property
    def most(self) -> int:
        """What is taken in the largest call."""
        return self.resident + max(self.engine_call, self.vae_call)


def place_encoders(
    needs: Needs, encoders: Mapping[str, int], free: int, *, keeps_text: bool, may_precede: bool
) -> dict[str, str]:
    """Where each encoder runs, of these bytes, on a GPU with so many free before all is opened.

    keeps_text: whether the text encoder is to stay. may_precede: whether the first prompts are
    known and the engine is not open yet. An encoder that would take memory from a call of the
    engine or of the VAE is freed before it. Encoders are opened at the same time.
    """
    resident, freed = needs.resident, 0
    call = needs.most - resident
    placed: dict[str, str] = {}
    for part, size in encoders.items():
        stays = keeps_text or part != "text_encoder"
        fits = resident + freed + size <= free
        if stays and fits and resident + call + size <= free:
            placed[part] = BESIDE
            resident += size
        elif fits:
            placed[part] = BEFORE
            freed += size
        elif part == "text_encoder" and may_precede and size + _MARGIN <= free:
            placed[part] = FIRST
        else:
            placed[part] = CPU
    return placed


def placement_note(part: str, place: str, size: int, needs: Needs, free: int) -> str:
    """One line about an encoder that does not stay beside the engine; empty for one that does."""
    if place == BESIDE:
        return ""
    engine = needs.engine + needs.state + needs.engine_call
    vae = needs.vae + needs.vae_call
    blocks = needs.blocks and f" ({needs.blocks})"
    return (
        f"{_TITLES[part]} ({size / 1e9:.1f} GB) {_HOW[place]}: the GPU has {free / 1e9:.1f} GB "
        f"free, of which the engine takes {engine / 1e9:.1f}{blocks} and the VAE {vae / 1e9:.1f}"
    )


def needs_of(
    manifest: Manifest,
    engine: EngineRecord,
    vae: EngineRecord | None,
    *,
    offload: str | None = None,
    resident_blocks: int | None = None,
) -> Needs:
    """What an engine takes that is opened like this, and that of the VAE where the bundle has one.

    offload and resident_blocks, None for none, are as `load` takes them. A call of TensorRT is as
    its plan states, that of streamed blocks as the proof measured; that of the others is an
    estimate.
    """
    own = _engine_needs(manifest, engine, one_expert=offload is not None)
    if offload == "blocks":
        own = _streamed_needs(manifest, engine, own, resident_blocks or 0)
    if vae is None:
        return own
    sizes = vae.details.sizes
    decoding = needed_bytes(sizes, vae.geometry, vae.dtype, "decode", sizes.decode_chunk)
    held = sum(w.file.size for w in manifest.weights_of(vae.layout, role=vae.role))
    return replace(own, vae=held, vae_call=decoding)


def _engine_needs(manifest: Manifest, engine: EngineRecord, *, one_expert: bool) -> Needs:
    """What an engine takes with all its weights, or with those of one expert at a time."""
    sizes = [weights.file.size for weights in manifest.weights_of(engine.layout)]
    sizes = sizes or [file.size for file in engine.files.values()]
    program = program_of(manifest.config, engine.geometry)
    call = engine.build.get("activation_bytes") or activation_bytes(
        program, parameter_shapes(manifest.config), engine.dtype
    )
    held = max(sizes) if one_expert else sum(sizes)
    return Needs(held, call, state=state_bytes(program, engine.dtype))


def _streamed_needs(manifest: Manifest, engine: EngineRecord, whole: Needs, resident: int) -> Needs:
    """What an engine takes of whose blocks so many stay, and two more come by turns."""
    parts = parts_of(weights_layout(manifest.config, engine.dtype)[1], engine.program)
    layers = len(parts.layers)
    measured, stay = engine.proof.get("peak_bytes"), min(resident, layers)
    call = with_pieces(measured) if measured else whole.engine_call
    held = streamed_bytes(ModelNeeds(parts.rest.size, parts.layer_bytes, layers, call), stay)
    return replace(whole, engine=held, engine_call=call, blocks=f"{stay} of {layers} blocks stay")


def encoder_bytes(manifest: Manifest, part: str) -> int:
    """What an encoder takes on a GPU: as the bundle carries it, or as every Wan has it."""
    own = carried_in(manifest, part)
    if own is None:
        return PUBLISHED_BYTES[part]
    return own.file.size // (2 if own.dtype == "fp32" else 1)  # it computes in 16 bits there
