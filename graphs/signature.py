"""What a forward costs: attention operators, operations, and the scores of a layer."""

from wanexport.runtime.geometry import Geometry
from wanexport.runtime.wan_config import WanConfig


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
