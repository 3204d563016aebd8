"""Rewrite an ONNX model in memory."""

from collections.abc import Iterator

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import IdentityEliminationPass, RemoveUnusedNodesPass

from wanexport.exporter.rewrite.onnx_writes import INSIDE, rules
from wanexport.exporter.rewrite.record import STRIDED_WRITES, Left, Rewriting


def rewrite_onnx(model: ir.Model, inferred: onnx.ModelProto) -> Rewriting:
    """Apply every rule to the model's graph, in place; the counts, and the reasons of what is left.

    inferred is the same model after shape inference, from which types and sizes are taken. Nodes
    that nothing uses afterwards are removed. Functions, branches and bodies are left.
    """
    _state_types(model.graph, inferred)
    left: list[Left] = []
    fired = 0
    for one in rules(model.graph, left):
        count = one.apply_to_model(model)
        fired += count if any(rule.name == STRIDED_WRITES for rule in one) else 0
        if count:
            IdentityEliminationPass()(model)
            RemoveUnusedNodesPass()(model)
    named = {found.node for found in left}
    left += [found for found in _inside(model) if found.node not in named]
    return Rewriting({STRIDED_WRITES: fired}, tuple(left))


def _state_types(graph: ir.Graph, inferred: onnx.ModelProto) -> None:
    """State types and shapes that the model leaves out; those that it has stay."""
    found = {info.name: info.type.tensor_type for info in inferred.graph.value_info
             if info.type.HasField("tensor_type")}  # fmt: skip
    for node in graph:
        for value in node.outputs:
            stated = found.get(value.name or "")
            if stated is None or not stated.elem_type:
                continue
            if value.type is None:
                value.type = ir.TensorType(ir.DataType(stated.elem_type))
            if value.shape is None and stated.HasField("shape"):
                value.shape = ir.Shape(
                    [d.dim_value if d.HasField("dim_value") else (d.dim_param or None)
                     for d in stated.shape.dim]
                )  # fmt: skip


def _inside(model: ir.Model) -> Iterator[Left]:
    """The writes in functions, and in the branches and bodies of control flow."""
    parts: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for part in parts:
        for node in ir.traversal.RecursiveGraphIterator(part):
            if node.op_type == "ScatterND" and node.graph is not model.graph:
                yield Left(STRIDED_WRITES, node.name or "", INSIDE)
