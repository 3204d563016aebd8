"""What a forward costs: attention operators, operations, and the scores of a layer."""

from wanexport.runtime.geometry import Geometry
from wanexport.runtime.program import Program
from wanexport.runtime.wan_config import WanConfig


def attention_count(program: Program) -> int:
    """Attention operators in one forward, of every kind."""
    return sum(attention.count for attention in program.attention.values())


def forward_flops(config: WanConfig, geometry: Geometry) -> int:
    """Floating-point operations of plain Wan's blocks in one forward (a multiply-add counts two).

    That of a causal model is a step of a chunk with a full cache.
    Of another family it tells those that it shares with plain Wan.
    """
    return product_flops(config, geometry) + attention_flops(config, geometry)


def product_flops(config: WanConfig, geometry: Geometry) -> int:
    """Those of `forward_flops` that are in matrix products of the parameters."""
    tokens, dim = geometry.num_tokens, config.dim
    # A causal model's keys and values of the text are of the prompt, not of a forward.
    context = 0 if geometry.chunk else config.text_len + config.image_tokens
    linear = 12 * tokens * dim**2 + 4 * context * dim**2 + 4 * tokens * dim * config.ffn_dim
    return config.num_layers * linear


def attention_flops(config: WanConfig, geometry: Geometry) -> int:
    """Those of `forward_flops` that are in attention."""
    tokens, context = geometry.num_tokens, config.text_len + config.image_tokens
    attended = geometry.cache * geometry.frame_tokens or tokens
    return config.num_layers * 4 * tokens * (attended + context) * config.dim


def attention_score_bytes(config: WanConfig, program: Program) -> int:
    """Size in fp32 of one layer's largest scores, for runtimes that keep them whole."""
    sizes = (attention.queries * attention.keys for attention in program.attention.values())
    return 4 * config.num_heads * max(sizes, default=0)
