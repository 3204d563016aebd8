"""What fits on a GPU of so much memory, and with which options: arithmetic, without a GPU.

`inspect`, `doctor`, `load` and whoever places the parts around an engine ask this one function.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from wanexport.runtime.program import ENGINE_DTYPE, Program

LAYER_BUFFERS = 2  # that streamed layers use by turns: one computes, the other is copied into
CARDS = tuple(n << 30 for n in (8, 12, 16, 24, 32, 48, 80))  # bytes that are sold
# Bytes a second that a copy from page-locked memory reaches, of 15.75 GB/s a lane of 16 and
# generation: about three quarters.
BUSES = {"PCIe 3 x16": 12e9, "PCIe 4 x16": 24e9, "PCIe 5 x16": 48e9}
_CONTEXT = 800 << 20  # of a card: CUDA's context, libraries and a display
_LEAST_ACTIVATIONS = 900 << 20  # with the workspaces of cuBLAS and attention
_PIECES = 1.05  # of activations: what the allocator loses to pieces of the wrong size
_ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Needs:
    """What running a model on a GPU takes, in bytes.

    `layer` are the parameters of one of `layers`, `rest` all others of one expert. `activations`
    is what a forward takes beside parameters, and `state` what a session keeps, as a causal model's
    cache. `vae` is what the VAE takes for the whole picture, its weights included, `tiles` the same
    in tiles, and `text` the text encoder.
    """

    rest: int
    layer: int
    layers: int
    activations: int
    experts: int = 1
    vae: int = 0
    tiles: int = 0
    text: int = 0
    state: int = 0


class Fit(NamedTuple):
    """How a model fits: `offload` and `resident_blocks` as `load` takes them, bytes that a forward
    copies to the GPU, where the VAE and the text encoder run, and what is taken at the most."""

    offload: str | None
    resident_blocks: int | None
    streamed: int
    vae: str  # whole, tiles or cpu
    text: str  # gpu or cpu
    taken: int


def fit(needs: Needs, room: int) -> Fit | None:
    """How a model fits in `room` bytes, best first; None where not even two layers do.

    Best is what copies least and leaves the VAE tiles to decode in, without which it would run on
    the CPU.
    """
    expert = needs.rest + needs.layers * needs.layer
    ways = {None: needs.state + needs.experts * expert, "experts": needs.state + expert}
    blocks = fit_blocks(needs, room)
    for beside in (max(needs.activations, needs.tiles), needs.activations):
        for offload, held in ways.items():
            if held + beside <= room:
                return _placed(needs, room, held, Fit(offload, None, 0, "", "", 0))
        if blocks is not None and blocks.vae != "cpu":
            return blocks
    return blocks


def fit_blocks(needs: Needs, room: int) -> Fit | None:
    """How a model fits whose blocks are streamed; as many stay as leave the VAE its room: decoding
    in tiles shows, and copies hide behind computation."""
    least = streamed_bytes(needs, 0)
    if least + needs.activations > room or not needs.layer:
        return None
    beside = next(size for size in (needs.vae, needs.tiles, 0) if least + size <= room)
    spare = room - least - max(needs.activations, beside)
    resident = max(0, min(spare // needs.layer, needs.layers - LAYER_BUFFERS))
    streamed = (needs.layers - resident) * needs.layer
    held = streamed_bytes(needs, resident)
    return _placed(needs, room, held, Fit("blocks", resident, streamed, "", "", 0))


def streamed_bytes(needs: Needs, resident: int) -> int:
    """What a model whose blocks are streamed holds all the time: a session's state, what is in no
    layer, the buffers, and the layers that stay."""
    buffers = min(LAYER_BUFFERS, needs.layers)
    return needs.state + needs.rest + (buffers + resident) * needs.layer


def _placed(needs: Needs, room: int, held: int, found: Fit) -> Fit:
    """The fit with the places of VAE and text encoder, beside what is held all the time."""
    whole, tiles = (held + size <= room for size in (needs.vae, needs.tiles))
    vae, decoding = ("whole", needs.vae) if whole else ("tiles", needs.tiles)
    if not (whole or tiles):
        vae, decoding = "cpu", 0
    taken = held + max(needs.activations, decoding)
    has_text = taken + needs.text <= room
    text = "gpu" if has_text else "cpu"
    return found._replace(vae=vae, text=text, taken=taken + has_text * needs.text)


def room_of_card(size: int) -> int:
    """What a card of `size` bytes leaves to tensors."""
    return max(0, size - _CONTEXT)


def activation_bytes(program: Program, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> int:
    """What a forward takes beside its parameters in an AOTInductor engine on a GPU.

    shapes are those of the parameters. An estimate: a layer holds its fp32 input and result, two
    values of the engine's precision of that size, and the widest product's output. Of bf16 engines
    from 1.3 to 14 billion parameters it is 2 to 8 % more than was measured on an H100.
    """
    repeated = max(program.calls, key=lambda call: call.repeat)
    sizes = [prod(program.values[n].shape) for n in repeated.writes if n in program.values]
    values = max(sizes, default=0)
    width = _last_dimension(program, repeated.writes)
    names = {name for own, _ in repeated.layers() for name in own}
    widest = max((shapes[n][0] for n in names if len(shapes.get(n, ())) == 2), default=width)
    item = _ITEMSIZE.get(dtype, 4)
    estimate = values * (8 + 2 * item) + values // width * widest * item
    return max(_LEAST_ACTIVATIONS, with_pieces(estimate))


def state_bytes(program: Program, dtype: str) -> int:
    """What a session of an engine of this precision keeps."""
    return sum(
        prod(spec.shape) * _ITEMSIZE.get(dtype if spec.dtype == ENGINE_DTYPE else "fp32", 4)
        for spec in program.states().values()
    )


def with_pieces(size: int) -> int:
    """Bytes that an allocator takes for a forward that needs so many."""
    return round(size * _PIECES)


def _last_dimension(program: Program, names: Iterable[str]) -> int:
    return max((program.values[n].shape[-1] for n in names if n in program.values), default=1)


def streamed_seconds(forward: float, size: int, rate: float) -> float:
    """Seconds of a forward that computes for `forward` and copies `size` bytes at `rate` a second,
    the layers that are copied being spread evenly: the longer of both."""
    return max(forward, size / rate)
