"""The VAEs of Wan by their sizes: layers in order, parameters, feature caches, and the Program.

Both are causal in time. The first latent frame is computed alone, and stands for one frame of
pixels, each later one for four; a steady call takes a chunk of them. What a convolution needs of
earlier frames is state. Tensors are [frames, height, width, channels], a kernel
[out, time, height, width, in].

Names are diffusers' (`AutoencoderKLWan`), which has both VAEs in one class; facts are those of
Wan-Video/Wan2.1 `wan/modules/vae.py` and Wan2.2 `vae2_2.py`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from types import MappingProxyType

from wanexport.runtime.geometry import TEMPORAL_STRIDE, Geometry
from wanexport.runtime.program import ENGINE_DTYPE, Attention, Call, Input, Program, TensorSpec
from wanexport.runtime.vae_config import VaeConfig

GRAPH = "wanexport.graphs.vae:WanVae"
PARTS = ("decode", "encode")  # a call is of one of them, and of a moment: `decode_first`
MOMENTS = ("first", "next")
STATISTICS = ("latents_mean", "latents_scale")  # of each channel; the scale is 1 / deviation
_MULTIPLIERS = (1, 2, 4, 4)  # of the width, by level
_HALVES_TIME = (False, True, True)  # whether the encoder's resampling between levels does
_RESNETS = 2  # of an encoder's level; a decoder's has one more
_Shapes = Iterator[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Layer:
    """A layer by its kind: conv, resnet, attention, down, up or head.

    A down or up that is temporal halves or doubles the frames too, beside height and width.
    """

    kind: str
    name: str
    inner: int
    outer: int
    temporal: bool = False


@dataclass(frozen=True)
class Stage:
    """Layers in order; with a shortcut, the input is averaged or repeated to add to the result."""

    layers: tuple[Layer, ...]
    shortcut: tuple[int, int] | None = None  # factors of time, and of height and width


def encoder_stages(config: VaeConfig) -> list[Stage]:
    """The encoder's layers from patches to the moments of the latent's distribution."""
    widths = [config.encoder_dim * m for m in (1, *_MULTIPLIERS)]
    stages = [Stage((Layer("conv", "encoder.conv_in", config.pixel_channels, widths[0]),))]
    number = 0  # of a layer, where they are numbered in one row
    for level, (inner, outer) in enumerate(pairwise(widths)):
        layers, last = [], level == len(_MULTIPLIERS) - 1
        temporal = not last and _HALVES_TIME[level]
        for i in range(_RESNETS + (not last)):
            kind = "resnet" if i < _RESNETS else "down"
            within = f"{level}.resnets.{i}" if kind == "resnet" else f"{level}.downsampler"
            name = f"encoder.down_blocks.{within if config.is_residual else number}"
            width = inner if i == 0 else outer
            layers.append(Layer(kind, name, width, outer, temporal and kind == "down"))
            number += 1
        shortcut = (1 + temporal, 1 if last else 2) if config.is_residual else None
        stages.append(Stage(tuple(layers), shortcut))
    return [*stages, *_middle("encoder", widths[-1]), _head("encoder", outer, 2 * config.channels)]


def decoder_stages(config: VaeConfig) -> list[Stage]:
    """The decoder's layers from latents to patches."""
    widths = [config.decoder_dim * m for m in (_MULTIPLIERS[-1], *_MULTIPLIERS[::-1])]
    stages = [Stage((Layer("conv", "decoder.conv_in", config.channels, widths[0]),))]
    stages += _middle("decoder", widths[0])
    upsampler = "upsampler" if config.is_residual else "upsamplers.0"
    for level, (inner, outer) in enumerate(pairwise(widths)):
        last, name = level == len(_MULTIPLIERS) - 1, f"decoder.up_blocks.{level}"
        temporal = not last and _HALVES_TIME[::-1][level]
        if level and not config.is_residual:
            inner //= 2  # the upsampling before it halved them
        layers = [
            Layer("resnet", f"{name}.resnets.{i}", inner if i == 0 else outer, outer)
            for i in range(_RESNETS + 1)
        ]
        if not last:
            width = outer if config.is_residual else outer // 2
            layers.append(Layer("up", f"{name}.{upsampler}", outer, width, temporal))
        shortcut = (1 + temporal, 2) if config.is_residual and not last else None
        stages.append(Stage(tuple(layers), shortcut))
    return [*stages, _head("decoder", widths[-1], config.pixel_channels)]


def _middle(part: str, width: int) -> list[Stage]:
    kinds = {"resnets.0": "resnet", "attentions.0": "attention", "resnets.1": "resnet"}
    return [
        Stage((Layer(kind, f"{part}.mid_block.{name}", width, width),))
        for name, kind in kinds.items()
    ]


def _head(part: str, inner: int, outer: int) -> Stage:
    return Stage((Layer("head", part, inner, outer),))


def layers_of(stages: list[Stage]) -> list[Layer]:
    """The layers of all stages in order."""
    return [layer for stage in stages for layer in stage.layers]


@lru_cache(maxsize=16)
def parameter_shapes(config: VaeConfig) -> Mapping[str, tuple[int, ...]]:
    """Shape of every parameter, as the weights file has it."""
    size = config.channels
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(STATISTICS, (size,))
    shapes |= dict(_affine("quant_conv", 2 * size, 2 * size))
    shapes |= _affine("post_quant_conv", size, size)
    for layer in layers_of(encoder_stages(config) + decoder_stages(config)):
        shapes |= _layer_shapes(layer)
    return MappingProxyType(shapes)


def _layer_shapes(layer: Layer) -> _Shapes:
    name, inner, outer = layer.name, layer.inner, layer.outer
    if layer.kind == "conv":
        yield from _affine(name, outer, 3, 3, 3, inner)
    elif layer.kind == "head":
        yield f"{name}.norm_out.gamma", (inner,)
        yield from _affine(f"{name}.conv_out", outer, 3, 3, 3, inner)
    elif layer.kind == "attention":
        yield f"{name}.norm.gamma", (inner,)
        yield from _affine(f"{name}.to_qkv", 3 * inner, inner)
        yield from _affine(f"{name}.proj", inner, inner)
    elif layer.kind == "resnet":
        yield f"{name}.norm1.gamma", (inner,)
        yield from _affine(f"{name}.conv1", outer, 3, 3, 3, inner)
        yield f"{name}.norm2.gamma", (outer,)
        yield from _affine(f"{name}.conv2", outer, 3, 3, 3, outer)
        if inner != outer:
            yield from _affine(f"{name}.conv_shortcut", outer, inner)
    else:
        yield from _affine(f"{name}.resample.1", outer, 1, 3, 3, inner)
        if layer.temporal:
            width = 2 * inner if layer.kind == "up" else inner
            yield from _affine(f"{name}.time_conv", width, 3, 1, 1, inner)


def _affine(name: str, outer: int, *inner: int) -> _Shapes:
    yield f"{name}.weight", (outer, *inner)
    yield f"{name}.bias", (outer,)


def computes_fp32(parameter: str) -> bool:
    """Whether the engine uses this parameter in fp32, in whatever precision it decodes.

    Of the encoder all is, and of the decoder what no large product takes.
    """
    is_matrix = parameter.endswith(".weight") and not parameter.startswith("post_quant_conv.")
    return not (is_matrix and parameter.startswith("decoder."))


def vae_program(config: VaeConfig, geometry: Geometry) -> Program:
    """The calls that decode and encode a first latent frame, and a chunk of later ones.

    Frames come out twice: as pixels in fp32, clamped to [-1, 1], and cut to uint8.
    """
    _, height, width = geometry.latent
    sides = geometry.height // config.patch, geometry.width // config.patch
    decoding = dict(_states(decoder_stages(config), height, width, ENGINE_DTYPE))
    encoding = dict(_states(encoder_stages(config), *sides, "fp32"))
    inputs: dict[str, Input] = {}
    outputs: dict[str, TensorSpec] = {}
    calls = []
    for part, when in ((part, when) for part in PARTS for when in MOMENTS):
        chunk = config.decode_chunk if part == "decode" else config.encode_chunk
        count = 1 if when == "first" else chunk
        frames = 1 if when == "first" else chunk * TEMPORAL_STRIDE
        latent = (count, height, width, config.channels)
        video = (frames, geometry.height, geometry.width, 3)
        if part == "decode":
            read, shape, state = f"latent.{when}", latent, _of_moment(decoding, when)
            written = {
                f"pixels.{when}": TensorSpec(video),
                f"frames.{when}": TensorSpec(video, "U8"),
            }
        else:
            read, shape, state = f"video.{when}", video, tuple(encoding)
            written = {f"mean.{when}": TensorSpec(latent)}
        inputs[read] = Input(shape)
        outputs |= written
        names = _parameters(config, part, when)
        calls.append(Call(f"{part}_{when}", (read,), tuple(written), names, state, when=when))
    return Program(
        inputs=inputs,
        outputs=outputs,
        calls=tuple(calls),
        state={**decoding, **encoding},
        attention={"frame": Attention(len(calls), height * width, height * width)},
    )


def _parameters(config: VaeConfig, part: str, when: str) -> tuple[str, ...]:
    """The parameters of a call, in the order of the model; a first frame passes no time_conv."""
    prefixes = {"decode": ("decoder.", "post_quant_conv."), "encode": ("encoder.", "quant_conv.")}
    return tuple(
        name
        for name in parameter_shapes(config)
        if name in STATISTICS or name.startswith(prefixes[part])
        if when != "first" or ".time_conv." not in name
    )


def _of_moment(states: Mapping[str, TensorSpec], when: str) -> tuple[str, ...]:
    """The states of a decoder's call: a time_conv's history begins after the first frame."""
    return tuple(name for name in states if when != "first" or not name.endswith("time_conv"))


def _states(
    stages: list[Stage], height: int, width: int, dtype: str
) -> Iterator[tuple[str, TensorSpec]]:
    """The frames that each convolution over time keeps of its input."""
    for layer in layers_of(stages):
        name, sides = layer.name, (height, width)
        if layer.kind == "conv":
            yield name, TensorSpec((2, *sides, layer.inner), dtype)
        elif layer.kind == "head":
            yield f"{name}.conv_out", TensorSpec((2, *sides, layer.inner), dtype)
        elif layer.kind == "resnet":
            yield f"{name}.conv1", TensorSpec((2, *sides, layer.inner), dtype)
            yield f"{name}.conv2", TensorSpec((2, *sides, layer.outer), dtype)
        elif layer.kind == "up":
            if layer.temporal:
                yield f"{name}.time_conv", TensorSpec((2, *sides, layer.inner), dtype)
            height, width = 2 * height, 2 * width
        elif layer.kind == "down":
            height, width = height // 2, width // 2
            if layer.temporal:
                yield f"{name}.time_conv", TensorSpec((1, height, width, layer.outer), dtype)
