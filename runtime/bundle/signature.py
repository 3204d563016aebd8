"""What follows from a model's sizes and a geometry: inputs, parameters, regions, weights' layout.

The runtime holds a manifest against it before any compiled code is called.
"""

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from hashlib import sha256
from types import MappingProxyType

from wanexport.runtime.bundle.tensorfile import TensorEntry, make_header
from wanexport.runtime.geometry import PATCH, Geometry
from wanexport.runtime.wan_config import IMAGE_DIM, WanConfig

REGIONS = ("embed", "block", "head")  # that an AOTInductor engine is compiled in
BLOCK = "blocks.{}."  # how the parameters of one block are named
SAFETENSORS_DTYPES = {
    "fp32": "F32",
    "bf16": "BF16",
    "fp16": "F16",
}  # as safetensors names them
_FP32_PARAMETERS = re.compile(
    r"time_embedding\.|time_projection\.|head\.|.*modulation$|.*norm|img_emb\.(proj\.[04]\.|emb_pos)"
)

_Shapes = Iterator[tuple[str, tuple[int, ...]]]


def input_shapes(config: WanConfig, geometry: Geometry) -> dict[str, tuple[int, ...]]:
    """Shape of every graph input, in the order of `WanModel.forward`; all are fp32."""
    latent = geometry.latent
    shapes: dict[str, tuple[int, ...]] = {
        "latent": (1, config.out_channels, *latent),
        "timestep": (config.num_timesteps(geometry),),
        "text": (1, config.text_len, config.text_dim),
    }
    if config.condition_channels:
        shapes["condition"] = (1, config.condition_channels, *latent)
    if config.image_tokens:
        shapes["image"] = (1, config.image_tokens, IMAGE_DIM)
    return shapes


@lru_cache(maxsize=16)
def parameter_shapes(config: WanConfig) -> Mapping[str, tuple[int, ...]]:
    """Shape of every parameter by its official name, in the order that `WanModel` has them."""
    dim, patch = config.dim, (config.in_channels, 1, PATCH, PATCH)
    shapes = dict(_affine("patch_embedding", dim, *patch))
    shapes |= _affine("text_embedding.0", dim, config.text_dim)
    shapes |= _affine("text_embedding.2", dim, dim)
    shapes |= _affine("time_embedding.0", dim, config.freq_dim)
    shapes |= _affine("time_embedding.2", dim, dim)
    shapes |= _affine("time_projection.1", 6 * dim, dim)
    shapes |= _image_embedding(config)
    block = dict(_block(config))
    for index in range(config.num_layers):
        shapes |= {BLOCK.format(index) + name: shape for name, shape in block.items()}
    shapes["head.modulation"] = (1, 2, dim)
    shapes |= _affine("head.head", PATCH * PATCH * config.out_channels, dim)
    return MappingProxyType(shapes)


def _affine(name: str, rows: int, *columns: int) -> _Shapes:
    """Weight and bias of a matrix, or where there are no columns of a norm."""
    yield f"{name}.weight", (rows, *columns)
    yield f"{name}.bias", (rows,)


def _image_embedding(config: WanConfig) -> _Shapes:
    if config.image_tokens == 514:
        yield "img_emb.emb_pos", (1, 514, IMAGE_DIM)
    if config.image_tokens:
        yield from _affine("img_emb.proj.0", IMAGE_DIM)
        yield from _affine("img_emb.proj.1", IMAGE_DIM, IMAGE_DIM)
        yield from _affine("img_emb.proj.3", config.dim, IMAGE_DIM)
        yield from _affine("img_emb.proj.4", config.dim)


def _block(config: WanConfig) -> _Shapes:
    """The parameters of one block, by their names within it."""
    dim = config.dim
    yield "modulation", (1, 6, dim)
    yield from _attention("self_attn", dim)
    yield from _affine("norm3", dim)
    yield from _attention("cross_attn", dim)
    if config.image_tokens:
        yield from _affine("cross_attn.k_img", dim, dim)
        yield from _affine("cross_attn.v_img", dim, dim)
        yield "cross_attn.norm_k_img.weight", (dim,)
    yield from _affine("ffn.0", config.ffn_dim, dim)
    yield from _affine("ffn.2", dim, config.ffn_dim)


def _attention(name: str, dim: int) -> _Shapes:
    for projection in "qkvo":
        yield from _affine(f"{name}.{projection}", dim, dim)
    for norm in ("norm_q", "norm_k"):
        yield f"{name}.{norm}.weight", (dim,)


def region_parameters(config: WanConfig) -> dict[str, tuple[str, ...]]:
    """The official names of each region's parameters, in the order it takes them.

    Those of the block are named as the first block's.
    """
    names: dict[str, list[str]] = {region: [] for region in REGIONS}
    for name in parameter_shapes(config):
        if name.startswith("head."):
            names["head"].append(name)
        elif not name.startswith("blocks."):
            names["embed"].append(name)
        elif name.startswith(BLOCK.format(0)):
            names["block"].append(name)
    return {region: tuple(own) for region, own in names.items()}


def key_lengths(config: WanConfig, geometry: Geometry) -> list[int]:
    """Numbers of keys that the model's attention operators have: tokens, text, image tokens."""
    lengths = [geometry.num_tokens, config.text_len, config.image_tokens]
    return [length for length in dict.fromkeys(lengths) if length]


def stays_fp32(parameter: str) -> bool:
    """Whether the official code uses this parameter in fp32, whatever it computes in."""
    return _FP32_PARAMETERS.match(parameter) is not None


def weights_layout(config: WanConfig, dtype: str) -> tuple[bytes, dict[str, TensorEntry]]:
    """Header and entries of the weights file of this config in fp32, bf16 or fp16."""
    return make_header(
        {
            name: ("F32" if stays_fp32(name) else SAFETENSORS_DTYPES[dtype], shape)
            for name, shape in parameter_shapes(config).items()
        }
    )


@lru_cache(maxsize=16)
def weights_header_sha256(config: WanConfig, dtype: str) -> str:
    """Hash of the header of the weights file of this config in fp32, bf16 or fp16."""
    return sha256(weights_layout(config, dtype)[0]).hexdigest()
