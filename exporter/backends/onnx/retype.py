"""Retype lowered calls to fp32: what a machine that cannot run a precision runs in its place.

It is the engine's own graph, with every rewrite that it has: each value, cast and constant of the
low precision becomes fp32, and a parameter that is stored in it is widened where it is first used.
"""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir

from wanexport.exporter.backends.onnx.lower import Lowered
from wanexport.runtime.dtypes import DTYPES

_WIDE = ir.DataType.FLOAT
# Attributes that name the type of a result, or that an operator computes in.
_OF_TYPES = ("to", "dtype", "output_dtype", "stash_type", "softmax_precision")


def retype(lowered: Lowered, dtype: str) -> Lowered:
    """Calls of this precision in fp32, which read the same weights. The calls are changed.

    Raises onnx's own exceptions when something of the precision is left.
    """
    low = getattr(ir.DataType, DTYPES[dtype].onnx)
    for call in (call for call in lowered.program.calls if not call.code):
        model = lowered.calls[call.name]
        graph, own = model.graph, len(call.parameters)
        _widen_values((*graph.inputs[own:], *graph.initializers.values()), low)
        for node in graph:
            _widen_values(node.outputs, low)
            _widen_attributes(node, low)
        for value in graph.inputs[:own]:
            if value.dtype == low and value.uses():
                _store(graph, value, low)
        onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return replace(lowered, dtype="fp32")


def _widen_values(values: Iterable[ir.Value], low: ir.DataType) -> None:
    for value in values:
        if value.dtype == low:
            value.type = ir.TensorType(_WIDE)
            if value.const_value is not None:
                value.const_value = _widened(value.const_value)


def _widen_attributes(node: ir.Node, low: ir.DataType) -> None:
    for name, attribute in list(node.attributes.items()):
        if attribute.type == ir.AttributeType.INT and name in _OF_TYPES and attribute.value == low:
            node.attributes[name] = ir.AttrInt64(name, int(_WIDE))
        elif attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == low:
            node.attributes[name] = ir.AttrTensor(name, _widened(attribute.value))


def _widened(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.Tensor(tensor.numpy().astype(np.float32), name=tensor.name)


def _store(graph: ir.Graph, value: ir.Value, low: ir.DataType) -> None:
    """Cast a parameter, which keeps its stored type, to fp32 where it is first used.

    Left alone, ONNX Runtime would cast every weight before the first product. So the cast waits
    for the activation that the weight is multiplied with: it reads the weight through a Reshape
    whose shape adds 0 times that activation's length.
    """
    assert value.shape is not None
    uses = list(value.uses())
    users = {use.node for use in uses}
    first = next(node for node in graph if node in users)
    activation = _activation(first, value)
    nodes, source = [], value
    if activation is not None:
        shape = ir.node("Constant", [], attributes={"value_ints": value.shape.numpy()})
        zero = ir.node("Constant", [], attributes={"value_ints": [0]})
        length = ir.node("Shape", [activation], attributes={"start": 0, "end": 1})
        nothing = ir.node("Mul", [length.outputs[0], zero.outputs[0]])
        same = ir.node("Add", [shape.outputs[0], nothing.outputs[0]])
        view = ir.node("Reshape", [value, same.outputs[0]])
        source = view.outputs[0]
        source.shape, source.type = value.shape, ir.TensorType(low)  # no inference would find it
        nodes = [shape, zero, length, nothing, same, view]
    cast = ir.node("Cast", [source], attributes={"to": _WIDE})
    for use in uses:
        use.node.replace_input_with(use.idx, cast.outputs[0])
    graph.insert_before(first, [*nodes, cast])


def _activation(node: ir.Node, parameter: ir.Value) -> ir.Value | None:
    """What a node multiplies a parameter with; None where that has no length or is not computed."""
    value = node.inputs[0]
    if value is None or value is parameter:
        return None
    maker = value.producer()
    has_length = value.shape is None or len(value.shape)
    return value if has_length and (maker is None or maker.op_type != "Constant") else None
