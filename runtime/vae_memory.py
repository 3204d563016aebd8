"""How much work a VAE is, and the memory that a call of it takes, by its sizes.

Memory is estimated: what each layer has alive at once, by the layer that has the most. A build
records beside it what was measured on a GPU.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from wanexport.runtime.geometry import TEMPORAL_STRIDE, Geometry
from wanexport.runtime.vae_config import VaeConfig
from wanexport.runtime.wan_vae import Layer, decoder_stages, encoder_stages, layers_of, vae_program

_ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}


class Placed(NamedTuple):
    """A layer with the frames, height and width of its input."""

    layer: Layer
    frames: int
    height: int
    width: int


def placed(layers: Sequence[Layer], frames: int, height: int, width: int) -> Iterator[Placed]:
    """Each layer with the size of its input, in a steady call."""
    for layer in layers:
        yield Placed(layer, frames, height, width)
        if layer.kind == "up":
            height, width = 2 * height, 2 * width
            frames *= 1 + layer.temporal
        elif layer.kind == "down":
            height, width = height // 2, width // 2
            frames //= 1 + layer.temporal


def part_layers(config: VaeConfig, geometry: Geometry, part: str, chunk: int) -> list[Placed]:
    """The layers of a steady call that decodes or encodes a chunk of latent frames."""
    if part == "decode":
        _, height, width = geometry.latent
        return list(placed(layers_of(decoder_stages(config)), chunk, height, width))
    sides = geometry.height // config.patch, geometry.width // config.patch
    return list(placed(layers_of(encoder_stages(config)), chunk * TEMPORAL_STRIDE, *sides))


def steady_flops(config: VaeConfig, geometry: Geometry, part: str) -> int:
    """Floating-point operations for one latent frame after the first (a multiply-add counts two).

    Convolutions and attention; a causal one over time counts its kept frames.
    """
    return sum(map(_flops, part_layers(config, geometry, part, 1)))


def decoding_flops(config: VaeConfig, geometry: Geometry) -> int:
    """Floating-point operations of decoding a whole video, its first frame by its own calls."""
    later = geometry.latent[0] - 1
    first = steady_flops(config, geometry, "decode") / TEMPORAL_STRIDE  # about: fewer low down
    return round(later * steady_flops(config, geometry, "decode") + first)


def _flops(place: Placed) -> int:
    layer, frames, height, width = place
    inner, outer, pixels = layer.inner, layer.outer, frames * height * width
    if layer.kind in ("conv", "head"):
        return 2 * 27 * pixels * inner * outer
    if layer.kind == "resnet":
        beside = inner * outer if inner != outer else 0
        return 2 * pixels * (27 * (inner * outer + outer**2) + beside)
    if layer.kind == "attention":
        return 2 * pixels * inner * (4 * inner + 2 * height * width)
    doubled = 4 * (1 + layer.temporal) if layer.kind == "up" else 0.25
    over_time = (2 * 3 * 2 if layer.kind == "up" else 2 * 3 / 8) * pixels * inner**2
    return round(2 * 9 * doubled * pixels * inner * outer + layer.temporal * over_time)


def needed_bytes(config: VaeConfig, geometry: Geometry, dtype: str, part: str, chunk: int) -> int:
    """Memory of a steady call, its state included and weights not."""
    itemsize = _ITEMSIZE[dtype if part == "decode" else "fp32"]
    states = vae_program(config, geometry).states()
    prefix = "decoder." if part == "decode" else "encoder."
    kept = sum(_elements(spec.shape) for name, spec in states.items() if name.startswith(prefix))
    alive = max(map(_alive, part_layers(config, geometry, part, chunk)))
    return itemsize * (kept + alive)


def _elements(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _alive(place: Placed) -> int:
    """Elements that a layer has at once: its input, what a convolution reads, and its result."""
    layer, frames, height, width = place
    pixels = height * width
    if layer.kind == "up":
        grown = frames * (1 + layer.temporal) * 4 * pixels
        return grown * (layer.inner + layer.outer) + frames * pixels * layer.inner
    if layer.kind == "attention":
        return 2 * pixels**2 + 5 * frames * pixels * layer.inner
    widest = max(layer.inner, layer.outer)
    return pixels * (2 * frames * widest + (frames + 2) * widest + frames * layer.outer)
