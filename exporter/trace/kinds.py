"""What kind of work a kernel or an operator does, told by its name."""

import re
from functools import lru_cache

from wanexport.exporter.trace.event import NODE

PRODUCTS, ATTENTION, ELEMENTWISE = "products", "attention", "elementwise"
COPIES, COLLECTIVES, OTHER = "copies", "collectives", "other"
KINDS = (PRODUCTS, ATTENTION, ELEMENTWISE, COPIES, COLLECTIVES, OTHER)

_KERNELS = (  # the first that is found decides
    (ELEMENTWISE, r"^triton_(poi|red|per|for|split_scan)_"),  # Inductor's; operators' names follow
    (COLLECTIVES, r"nccl|rccl|c10d::|gloo:"),
    (ATTENTION, r"flash|fmha|attention|attn|sdpa|_mha|mha_"),
    (COPIES, r"^memcpy|^memset|catarray|copy_kernel|copyKernel|fillfunctor|transpose"),
    (
        PRODUCTS,
        r"gemm|gemv|cutlass|cublas|xmma|wgmma|nvjet|splitk|triton_tem|dot_kernel|conv(?!ert)"
        r"|cudnn|im2col|vol2col|::mm\b|matmul",
    ),
    (
        ELEMENTWISE,
        r"elementwise|triton_|^__myl|functor|reduce|norm|rms|rope|rotary|softmax|gelu|silu|relu"
        r"|sigmoid|index|gather|scatter|where|arange|cumsum|scan|sort|distribution|upsample|unary"
        r"|binary|cast|vectorized|pointwise|modulate|add_|mul_|_add|_mul|rowwisemoments|nonzero",
    ),
)
_PRODUCTS = {
    *("mm", "addmm", "bmm", "baddbmm", "addbmm", "linear", "matmul", "mv", "addmv", "dot"),
    *("vdot", "addr", "einsum", "_scaled_mm", "_int_mm", "mkldnn_linear", "inner", "outer"),
}
_COPIES = {
    *("copy_", "_to_copy", "to", "clone", "contiguous", "cat", "concat", "stack", "fill_"),
    *("zero_", "zeros", "ones", "full", "repeat", "lift_fresh", "constant_pad_nd", "pad"),
    *("zeros_like", "ones_like", "full_like", "roll", "flip", "_reshape_alias_copy"),
}
_ELEMENTWISE = {
    *("native_layer_norm", "layer_norm", "native_group_norm", "group_norm", "rms_norm"),
    *("_fused_rms_norm", "native_batch_norm", "batch_norm", "_softmax", "softmax", "cumsum"),
    *("_log_softmax", "log_softmax", "index", "index_put_", "_index_put_impl_", "index_select"),
    *("gather", "scatter", "scatter_", "scatter_add_", "embedding", "arange", "linspace", "sort"),
    *("topk", "nonzero", "masked_select", "masked_fill_", "dropout", "native_dropout", "where"),
    *("upsample_nearest2d", "upsample_nearest3d", "triu", "tril", "randn", "normal_", "rand"),
    *("uniform_", "bernoulli_", "cross", "frobenius_norm", "linalg_vector_norm", "logsumexp"),
}
_NODES = {
    PRODUCTS: "MatMul|Gemm|FusedMatMul|FusedGemm|Conv|FusedConv|MatMulNBits|Einsum",
    ATTENTION: ".*Attention.*",
    COPIES: "Concat|Transpose|Expand|Slice|Split|Gather|Identity|Tile|Pad|Memcpy.*|ConstantOfShape",
    COLLECTIVES: "All(Reduce|Gather|ToAll)",
    ELEMENTWISE: (
        "Add|Sub|Mul|Div|Pow|Sqrt|Neg|Abs|Exp|Log|Erf|Sin|Cos|Tanh|Sigmoid|Relu|.*Gelu|Silu|Swish"
        "|Softmax|.*Normalization|Reduce.*|Cast|Where|Clip|Round|Floor|Ceil|Min|Max|Range|Not|And"
        "|Or|Equal|Greater.*|Less.*|Reciprocal|RotaryEmbedding|ScatterND|GatherND|CumSum|Sign"
    ),
}


@lru_cache(maxsize=4096)
def kind_of(name: str) -> str:
    """The kind of a kernel, of an operator `aten::gelu`, or of a node `onnx::MatMul`."""
    if name.startswith(NODE):
        node = name.removeprefix(NODE)
        return next((kind for kind, own in _NODES.items() if re.fullmatch(own, node)), OTHER)
    if name.startswith("aten::"):
        return _of_operator(name.removeprefix("aten::"))
    return next((kind for kind, own in _KERNELS if re.search(own, name, re.IGNORECASE)), OTHER)


def _of_operator(name: str) -> str:
    if "attention" in name:
        return ATTENTION
    if name in _PRODUCTS or re.search(r"conv(?!ert)", name):
        return PRODUCTS
    if name in _COPIES:
        return COPIES
    if name in _ELEMENTWISE or is_pointwise(name):
        return ELEMENTWISE
    return OTHER


def is_pointwise(name: str) -> bool:
    """Whether PyTorch says of an operator that it is elementwise or a reduction."""
    import torch

    packet = getattr(torch.ops.aten, name, None)
    if packet is None:
        return False
    tags = {tag.name for one in packet.overloads() for tag in getattr(packet, one).tags}
    return bool(tags & {"pointwise", "reduction"}) or name in ("sum", "mean", "amax", "amin", "var")
