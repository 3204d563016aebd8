"""Attention in ONNX: as one operator, or in products and a softmax."""

from typing import Any

from onnxscript import opset23 as op


def native(q: Any, k: Any, v: Any, kind: str) -> Any:
    """[B, S, H, D] to ONNX's [B, H, S, D] and back; its default scale is ours, 1 / sqrt(D)."""
    q, k, v = (op.Transpose(x, perm=[0, 2, 1, 3]) for x in (q, k, v))
    out, *_ = op.Attention(q, k, v)  # the operator has optional outputs: take the first
    return op.Transpose(out, perm=[0, 2, 1, 3])


def decomposed(q: Any, k: Any, v: Any, kind: str) -> Any:
    """The same in products and a softmax."""
    return in_products(q, k, v)


def in_products(q: Any, k: Any, v: Any, counting: Any = None) -> Any:
    """Attention in products and a softmax, with the scale on q, as TensorRT fuses it; to the keys
    that count, by default all."""
    scale = op.CastLike(op.Constant(value_float=float(q.shape[-1]) ** -0.5), q)
    scaled = op.Mul(op.Transpose(q, perm=[0, 2, 1, 3]), scale)
    scores = op.MatMul(scaled, op.Transpose(k, perm=[0, 2, 3, 1]))
    if counting is not None:
        nothing = op.CastLike(op.Constant(value_float=float("-inf")), q)
        scores = op.Where(counting, scores, nothing)
    out = op.MatMul(op.Softmax(scores, axis=-1), op.Transpose(v, perm=[0, 2, 1, 3]))
    return op.Transpose(out, perm=[0, 2, 1, 3])


ATTENTION_FORMS: dict[str, Any] = {"native": native, "mha": native, "decomposed": decomposed}
