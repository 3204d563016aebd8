"""The indices of a ScatterND, which exporters compute of shapes and constants."""

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

_MOST = 1 << 20  # numbers of a constant that is computed
_COMPUTED = set(
    "Add Cast CastLike Concat ConstantOfShape Expand Gather Identity Mul Range Reshape Slice "
    "Squeeze Sub Transpose Unsqueeze".split()
)


def constant_of(
    value: ir.Value | None, known: dict[ir.Value, np.ndarray | None]
) -> np.ndarray | None:
    """The value's numbers where they are the same in every run, and few; known keeps them."""
    if value is None:
        return None
    pending = [value]
    while pending:
        current = pending[-1]
        node = current.producer()
        needed = [] if node is None or node.op_type == "Shape" else node.inputs
        missing = [one for one in needed if one is not None and one not in known]
        if current not in known and missing and node is not None and node.op_type in _COMPUTED:
            pending += missing
            continue
        if current not in known:
            known[current] = _compute(current, node, known)
        pending.pop()
    return known[value]


def _compute(
    value: ir.Value, node: ir.Node | None, known: dict[ir.Value, np.ndarray | None]
) -> np.ndarray | None:
    """One value of those that it is made of."""
    if value.const_value is not None and not value.is_graph_input():
        return value.const_value.numpy() if value.const_value.size <= _MOST else None
    if node is None:
        return None
    if node.op_type == "Shape" and not node.domain:
        return _shape(node)
    if node.op_type == "Constant" or (node.op_type in _COMPUTED and not node.domain):
        given = [None if one is None else known[one] for one in node.inputs]
        if all(one is None or got is not None for one, got in zip(node.inputs, given)):
            return _run(node, given)
    return None


def _shape(node: ir.Node) -> np.ndarray | None:
    source = node.inputs[0]
    if source is None or source.shape is None:
        return None
    sizes: Sequence[object] = list(source.shape)
    start, end = (node.attributes.get(name) for name in ("start", "end"))
    sizes = sizes[
        start.as_int() if start is not None else 0 : end.as_int() if end is not None else None
    ]
    return np.array(sizes, np.int64) if all(isinstance(n, int) for n in sizes) else None


def _run(node: ir.Node, given: list[np.ndarray | None]) -> np.ndarray | None:
    """What ONNX's own evaluator makes of one node."""
    proto = ir.to_proto(node)
    assert isinstance(proto, onnx.NodeProto)
    feeds = {name: array for name, array in zip(proto.input, given) if name and array is not None}
    version = node.version or (node.graph.opset_imports.get("") if node.graph else None) or 23
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            [proto], "one", [onnx.ValueInfoProto(name=name) for name in feeds],
            [onnx.ValueInfoProto(name=proto.output[0])],
        ),
        opset_imports=[onnx.helper.make_opsetid("", version)],
    )  # fmt: skip
    try:
        (result,) = ReferenceEvaluator(model).run(None, feeds)
    except Exception:  # an operator that the evaluator lacks in this version, or refuses
        return None
    array = np.asarray(result)
    return array if array.size <= _MOST else None
