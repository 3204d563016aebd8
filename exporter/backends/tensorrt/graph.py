"""What an ONNX graph is given for TensorRT's sake, without a change of what it computes."""

from math import sqrt

import onnx_ir as ir

_FACTOR = 0.25  # a power of two: products with it are exact in every precision


def separate_queries(model: ir.Model, head_dim: int) -> int:
    """Give attentions that share a query different scales, and return how many were changed.

    TensorRT for RTX 1.7 crashes where two attentions of one query are added, as in the image
    branch. It multiplies the query by the scale: with another scale it is another query. The keys,
    which are few, take the difference.
    """
    queries, changed = set(), 0
    for node in list(model.graph):
        if node.op_type != "Attention":
            continue
        query, key = node.inputs[:2]
        if query in queries:
            number = ir.node("Constant", [], attributes={"value_float": _FACTOR})
            factor = ir.node("CastLike", [number.outputs[0], key])
            scaled = ir.node("Mul", [key, factor.outputs[0]])
            model.graph.insert_before(node, [number, factor, scaled])
            node.replace_input_with(1, scaled.outputs[0])
            # ONNX's own scale is 1 / sqrt(D).
            node.attributes.add(ir.AttrFloat32("scale", 1 / (sqrt(head_dim) * _FACTOR)))
            changed += 1
        queries.add(query)
    return changed
