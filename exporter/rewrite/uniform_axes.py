"""Along which axes every value of a program is known to repeat itself, because it was expanded."""

import operator
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from wanexport.exporter.rewrite.aliases import changed_roots, roots
from wanexport.exporter.rewrite.cut import argument, cut_axis
from wanexport.exporter.rewrite.writer import value_of

aten = torch.ops.aten
Axes = frozenset[int]
_NONE: Axes = frozenset()
_AS_THE_FIRST = {
    "to", "_to_copy", "clone", "contiguous", "type_as", "detach", "alias", "lift_fresh_copy",
    "slice",
}  # fmt: skip
_RESHAPES = {
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze",
}  # fmt: skip
_SPLITS = {"split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk"}


def uniform_axes(program: ExportedProgram) -> dict[Node, Axes]:
    """For each node the axes along which all its elements are equal; an axis of one is left out."""
    found: dict[Node, Axes] = {}
    changed = changed_roots(program.graph)
    for node in program.graph.nodes:
        is_fixed = node.op == "call_function" and not (changed and roots(node) & changed)
        found[node] = _axes(node, found) if is_fixed else _NONE
    return found


def _axes(node: Node, found: dict[Node, Axes]) -> Axes:
    if node.target is operator.getitem:
        return found[node.all_input_nodes[0]]
    if not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.is_mutable:
        return _NONE
    if torch.Tag.nondeterministic_seeded in node.target.tags:
        return _NONE
    name = node.target._schema.name.removeprefix("aten::")
    value = node.meta.get("val")
    if not isinstance(value, Tensor | list | tuple) or not node.all_input_nodes:
        return _NONE
    first = node.all_input_nodes[0]
    if name in _SPLITS:
        dim = argument(node, 2, "dim", 0)
        source = value_of(first)
        return found[first] - {dim % source.dim()} if source is not None else _NONE
    if not isinstance(value, Tensor):
        return _NONE
    if name in _AS_THE_FIRST:
        return found[first] if _same_rank(first, value) else _NONE
    if name in _RESHAPES:
        return _reshaped(first, value, found)
    if torch.Tag.pointwise in node.target.tags:
        return _pointwise(node, value, found)
    special = _SPECIAL.get(name)
    return special(node, value, found) if special is not None else _NONE


def _same_rank(node: Node, value: Tensor) -> bool:
    source = value_of(node)
    return source is not None and source.dim() == value.dim()


def _reshaped(source: Node, value: Tensor, found: dict[Node, Axes]) -> Axes:
    """Axes that have the same size, and as much before them, in both shapes."""
    given = value_of(source)
    if given is None:
        return _NONE
    places = {_extent(given, a) for a in found[source]}
    return frozenset(a for a in range(value.dim()) if _extent(value, a) in places)


def _extent(value: Tensor, axis: int) -> tuple[str, str]:
    """How much is before an axis, and its size; as texts, for what is no number."""
    return str(prod(value.shape[:axis])), str(value.shape[axis])


def _is_one(size: int | torch.SymInt) -> bool:
    return isinstance(size, int) and size == 1


def _is_uniform(node: Node, axis: int, rank: int, found: dict[Node, Axes]) -> bool:
    """Whether an operand repeats itself along an axis of what it is broadcast to."""
    value = value_of(node)
    if value is None:
        return False
    own = axis - (rank - value.dim())
    return own < 0 or _is_one(value.shape[own]) or own in found[node]


def _pointwise(node: Node, value: Tensor, found: dict[Node, Axes]) -> Axes:
    rank = value.dim()
    return frozenset(
        a
        for a in range(rank)
        if not _is_one(value.shape[a])
        and all(_is_uniform(one, a, rank, found) for one in node.all_input_nodes)
    )


def _cat(node: Node, value: Tensor, found: dict[Node, Axes]) -> Axes:
    dim = argument(node, 1, "dim", 0) % value.dim()
    return frozenset.intersection(*(found[one] for one in node.all_input_nodes)) - {dim}


def _outer(node: Node, value: Tensor, found: dict[Node, Axes]) -> Axes:
    return frozenset(i for i in (0, 1) if found[node.args[i]])  # type: ignore[index]


def _linear(node: Node, value: Tensor, found: dict[Node, Axes]) -> Axes:
    return found[node.all_input_nodes[0]] - {value.dim() - 1}


def _addmm(node: Node, value: Tensor, found: dict[Node, Axes]) -> Axes:
    bias = value_of(node.args[0]) if isinstance(node.args[0], Node) else None
    is_row = bias is not None and bias.dim() == 1
    return found[node.args[1]] & {0} if is_row else _NONE  # type: ignore[index]


def _mm(node: Node, value: Tensor, found: dict[Node, Axes]) -> Axes:
    return found[node.args[0]] & {0}  # type: ignore[index]


def _select(node: Node, value: Tensor, found: dict[Node, Axes]) -> Axes:
    dim = cut_axis(node, value.dim() + 1)
    return frozenset(a - (a > dim) for a in found[node.all_input_nodes[0]] if a != dim)


def _transposed(node: Node, value: Tensor, found: dict[Node, Axes]) -> Axes:
    rank = value.dim()
    order = list(range(rank))
    if node.target is aten.permute.default:
        stated: Any = node.args[1]
        order = [int(axis) % rank for axis in stated]
    else:
        a, b = (int(axis) % rank for axis in node.args[1:3])  # type: ignore[arg-type]
        order[a], order[b] = b, a
    return frozenset(i for i, axis in enumerate(order) if axis in found[node.all_input_nodes[0]])


def _expand(node: Node, value: Tensor, found: dict[Node, Axes]) -> Axes:
    return _pointwise(node, value, found)  # an axis of one, and one that was not there, repeat


_SPECIAL: dict[str, Callable[[Node, Tensor, dict[Node, Axes]], Axes]] = {
    "expand": _expand,
    "cat": _cat,
    "outer": _outer,
    "linear": _linear,
    "addmm": _addmm,
    "mm": _mm,
    "select": _select,
    "transpose": _transposed,
    "permute": _transposed,
}


def rows_of(node: Node) -> Any:
    """The operand of a product whose rows are multiplied; None where the node is no product."""
    place = {aten.linear.default: 0, aten.mm.default: 0, aten.addmm.default: 1}.get(node.target)  # type: ignore[call-overload]
    return None if place is None else node.args[place]
