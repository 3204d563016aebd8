"""What goes into the graph and what it holds: input and parameter shapes, and counts."""

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

import torch

from wanexport.graphs.model import WanModel
from wanexport.runtime.geometry import PATCH, Geometry
from wanexport.runtime.wan_config import IMAGE_DIM, WanConfig


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


@cache
def parameter_shapes(config: WanConfig) -> Mapping[str, tuple[int, ...]]:
    """Shape of every parameter by its official name, without allocating any."""
    side = PATCH * config.spatial_stride
    with torch.device("meta"):
        model = WanModel(config, Geometry(side, side, 1, config.spatial_stride), torch.float32)
    return MappingProxyType({name: tuple(p.shape) for name, p in model.named_parameters()})


def attention_count(config: WanConfig) -> int:
    """Attention operators in one forward: two a block, three with the image branch."""
    return config.num_layers * (3 if config.image_tokens else 2)


def forward_flops(config: WanConfig, geometry: Geometry) -> int:
    """Floating-point operations of the blocks in one forward (a multiply-add counts two)."""
    tokens, dim = geometry.num_tokens, config.dim
    context = config.text_len + config.image_tokens
    linear = 12 * tokens * dim**2 + 4 * context * dim**2 + 4 * tokens * dim * config.ffn_dim
    attention_flops = 4 * tokens**2 * dim + 4 * tokens * context * dim
    return config.num_layers * (linear + attention_flops)


def attention_score_bytes(config: WanConfig, geometry: Geometry) -> int:
    """Size in fp32 of one layer's self-attention scores, for runtimes that keep them whole."""
    return 4 * config.num_heads * geometry.num_tokens**2
