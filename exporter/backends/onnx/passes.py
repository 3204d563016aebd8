"""Passes over a lowered call: fp32 biases and GELU, and the attention that runtimes want."""

from collections import Counter
from math import sqrt
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript import opset23 as op

_FACTOR = 0.25  # a power of two: products with it are exact in every precision


def plain_linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """One Gemm that reads the weight as stored: a MatMul would need a transposed copy of it."""
    shape = [int(n) for n in x.shape]
    if len(shape) == 2:
        return op.Gemm(x, weight, bias, transB=1)
    rows = op.Reshape(x, op.Constant(value_ints=[-1, shape[-1]]))
    product = op.Gemm(rows, weight, bias, transB=1)
    return op.Reshape(product, op.Constant(value_ints=[*shape[:-1], int(weight.shape[0])]))


def wide_linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """The product as `plain_linear`'s, rounded once, and the bias added in fp32."""
    if bias is None or weight.dtype == ir.DataType.FLOAT:
        return plain_linear(x, weight, bias)
    product = op.Cast(plain_linear(x, weight), to=ir.DataType.FLOAT)
    return op.Cast(op.Add(product, op.Cast(bias, to=ir.DataType.FLOAT)), to=weight.dtype)


def wide_gelu(x: Any, approximate: str = "none") -> Any:
    """GELU in fp32, with one rounding at its end."""
    wide = op.Gelu(op.Cast(x, to=ir.DataType.FLOAT), approximate=approximate)
    return op.Cast(wide, to=x.dtype)


def clamp(x: Any, min: float | None = None, max: float | None = None) -> Any:
    """Max and Min: of whole numbers TensorRT's parser takes these, and no Clip."""
    for operator, bound in ((op.Max, min), (op.Min, max)):
        if bound is not None:
            kind = "value_int" if isinstance(bound, int) else "value_float"
            x = operator(x, op.CastLike(op.Constant(**{kind: bound}), x))
    return x


def keep_wide(model: ir.Model) -> None:
    """Where the sum of a bias is rounded and cast back at once, take it as it was."""
    for node in model.graph:
        if _widens(node) and (rounding := _producer(node)) and rounding.op_type == "Cast":
            adding = _producer(rounding)
            if adding and adding.op_type == "Add":
                sides = [value.producer() for value in adding.inputs if value is not None]
                if all(side is not None and _widens(side) for side in sides):
                    node.outputs[0].replace_all_uses_with(adding.outputs[0])
    RemoveUnusedNodesPass()(model)


def _producer(node: ir.Node) -> ir.Node | None:
    """What computes the node's first input; None for an input of the graph."""
    return node.inputs[0].producer() if node.inputs[0] is not None else None


def _widens(node: ir.Node) -> bool:
    """Whether it is a cast to fp32."""
    to = node.attributes.get("to")
    return node.op_type == "Cast" and to is not None and to.as_int() == ir.DataType.FLOAT


def use_multi_head_attention(model: ir.Model) -> int:
    """Put `com.microsoft` MultiHeadAttention, on [B, S, H * D], for each Attention; say how many.

    The transposes around an Attention go with it. One to a cache, which has none, stays as it is.
    """
    is_of_cache = "q_num_heads"
    nodes = [
        node
        for node in model.graph
        if node.op_type == "Attention" and is_of_cache not in node.attributes
    ]
    for node in nodes:
        (transposed_back,) = (use.node for use in node.outputs[0].uses())
        q, k, v = (_before_transpose(value) for value in node.inputs)
        new: list[ir.Node] = []
        flat = [_reshape(x, _flat_shape(x), new) for x in (q, k, v)]
        heads = _static_shape(q)[2]
        attention = ir.node(
            "MultiHeadAttention", flat, attributes={"num_heads": heads}, domain="com.microsoft"
        )
        new.append(attention)
        out = attention.outputs[0]
        out.type, out.shape = q.type, ir.Shape(_flat_shape(q))
        result = _reshape(out, _static_shape(q), new)
        transposed_back.outputs[0].replace_all_uses_with(result)
        model.graph.insert_before(transposed_back, new)
    model.graph.opset_imports["com.microsoft"] = 1
    RemoveUnusedNodesPass()(model)
    return len(nodes)


def _before_transpose(value: ir.Value | None) -> ir.Value:
    """What the transpose that gives this value was given."""
    transpose = value.producer() if value is not None else None
    assert transpose is not None and transpose.op_type == "Transpose"
    source = transpose.inputs[0]
    assert source is not None
    return source


def _static_shape(value: ir.Value) -> list[int]:
    assert value.shape is not None
    return [int(size) for size in value.shape.numpy()]


def _flat_shape(value: ir.Value) -> list[int]:
    """[B, S, H * D] of a value of [B, S, H, D]."""
    batch, length, heads, width = _static_shape(value)
    return [batch, length, heads * width]


def _reshape(value: ir.Value, shape: list[int], nodes: list[ir.Node]) -> ir.Value:
    """The value in another shape; what computes it is appended to the nodes."""
    constant = ir.node("Constant", [], attributes={"value_ints": shape})
    reshape = ir.node("Reshape", [value, constant.outputs[0]])
    nodes += [constant, reshape]
    result = reshape.outputs[0]
    result.type, result.shape = value.type, ir.Shape(shape)
    return result


def separate_queries(model: ir.Model) -> int:
    """Give attentions that share a query different scales, and return how many were changed.

    TensorRT for RTX 1.7 crashes where two attentions of one query are added, as in the image
    branch. It multiplies the query by the scale: with another scale it is another query. The keys,
    which are few, take the difference.
    """
    earlier: Counter[ir.Value | None] = Counter()
    for node in [node for node in model.graph if node.op_type == "Attention"]:
        query = node.inputs[0]
        if earlier[query]:
            _scale_differently(model.graph, node, _FACTOR ** earlier[query])
        earlier[query] += 1
    return earlier.total() - len(earlier)


def _scale_differently(graph: ir.Graph, attention: ir.Node, factor: float) -> None:
    """Multiply an attention's keys by a factor, and divide its scale by it."""
    query, key = attention.inputs[:2]
    number = ir.node("Constant", [], attributes={"value_float": factor})
    cast = ir.node("CastLike", [number.outputs[0], key])
    scaled = ir.node("Mul", [key, cast.outputs[0]])
    graph.insert_before(attention, [number, cast, scaled])
    attention.replace_input_with(1, scaled.outputs[0])
    head_dim = _static_shape(_before_transpose(query))[-1]  # ONNX's own scale is 1 / sqrt of it
    attention.attributes.add(ir.AttrFloat32("scale", 1 / (sqrt(head_dim) * factor)))
