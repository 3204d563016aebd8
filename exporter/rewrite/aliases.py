"""What of an exported program may share memory: views, and what operators write in place."""

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Graph, Node

# Composite operators that never return what they are given; others may, and need not say so.
_FRESH = {
    f"aten::{name}"
    for name in (
        "linear matmul layer_norm rms_norm group_norm scaled_dot_product_attention conv1d conv2d "
        "conv3d softmax.int log_softmax.int outer square where.ScalarOther where.ScalarSelf"
    ).split()
}
_SILENT_VIEWS = {"aten::_unsafe_view"}
_SHAPE_ONLY = {
    "aten::_assert_tensor_metadata",
    "aten::sym_size.int",
    "aten::sym_stride.int",
    "aten::sym_numel",
    "aten::empty_like",
    "aten::zeros_like",
    "aten::ones_like",
    "aten::full_like",
}


def may_be_view_of(node: Node) -> list[Node]:
    """The arguments whose memory the node's result may be."""
    if node.op != "call_function":
        return []
    if node.target is operator.getitem:
        return node.all_input_nodes[:1]
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.all_input_nodes  # control flow
    if not any(r.alias_info for r in node.target._schema.returns):
        return node.all_input_nodes if _may_return_its_input(node.target) else []
    return [value for value, info in _given(node) if info is not None]


def is_plain_view(node: Node) -> bool:
    """Whether the node looks at memory and never copies it."""
    if node.target is operator.getitem:
        return True
    target = node.target
    return (
        isinstance(target, torch._ops.OpOverload)
        and not target._schema.is_mutable
        and any(r.alias_info for r in target._schema.returns)
        and (
            not _is_composite(target)
            or target._schema.name.endswith(("::unflatten", "::chunk", "::narrow"))
        )
    )


def written(node: Node) -> list[Node]:
    """The arguments that the node writes in place."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    return [value for value, info in _given(node) if info is not None and info.is_write]


def reads_values(node: Node) -> bool:
    """Whether the node reads more of a tensor than its shape and type."""
    target = node.target
    return not isinstance(target, torch._ops.OpOverload) or target.name() not in _SHAPE_ONLY


def roots(node: Node) -> set[Node]:
    """The nodes whose memory this one's may be: those that are no views themselves."""
    found, pending, seen = set(), [node], {node}
    while pending:
        current = pending.pop()
        sources = may_be_view_of(current)
        if not sources:
            found.add(current)
        pending += [source for source in sources if source not in seen]
        seen.update(sources)
    return found


def changed_roots(graph: Graph) -> set[Node]:
    """The memory that anything of the graph writes in place, as `roots` names it."""
    return {root for node in graph.nodes for target in written(node) for root in roots(target)}


def _given(node: Node) -> Iterator[tuple[Node, Any]]:
    """Each tensor argument with what the schema says of its memory."""
    assert isinstance(node.target, torch._ops.OpOverload)
    for i, argument in enumerate(node.target._schema.arguments):
        value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
        values = value if isinstance(value, list | tuple) else [value]
        yield from ((v, argument.alias_info) for v in values if isinstance(v, Node))


def _may_return_its_input(target: torch._ops.OpOverload) -> bool:
    is_silent = _is_composite(target) and target.name() not in _FRESH
    return is_silent or target.name() in _SILENT_VIEWS


def _is_composite(target: torch._ops.OpOverload) -> bool:
    key = "CompositeImplicitAutograd"
    return torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), key)
