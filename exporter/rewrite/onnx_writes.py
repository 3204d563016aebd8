"""Rules for ONNX graphs: ScatterND that write all of a tensor -> Concat and Reshape."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import pattern

from wanexport.exporter.rewrite.onnx_constants import constant_of
from wanexport.exporter.rewrite.partition import Arrangement, Part, arrange, part_of_indices
from wanexport.exporter.rewrite.record import STRIDED_WRITES, Left

Numbers = dict[ir.Value, np.ndarray | None]
INSIDE = "it is inside a function or control flow, which is left alone"
_OLDEST_OPSET = 13  # of Unsqueeze with axes as an input


class PlainCast(pattern.RewriteRuleClassBase):  # type: ignore[misc]
    """CastLike -> Cast: what it is like is then not read."""

    def pattern(self, op: Any, x: Any, like: Any) -> Any:
        """What is matched."""
        return op.CastLike(x, like)

    def check(self, context: Any, x: ir.Value, like: ir.Value) -> Any:
        """Whether the type is known."""
        result = pattern.MatchResult()
        return result if like.dtype is not None else result.fail("its type is not known")

    def rewrite(self, op: Any, x: ir.Value, like: ir.Value) -> Any:
        """The same cast by the name of its type."""
        return op.Identity(x) if x.dtype == like.dtype else op.Cast(x, to=like.dtype)


class MergedTransposes(pattern.RewriteRuleClassBase):  # type: ignore[misc]
    """Transpose of a Transpose -> one, or none where the second undoes the first."""

    def pattern(self, op: Any, x: Any) -> Any:
        """What is matched."""
        return op.Transpose(
            op.Transpose(x, _allow_other_attributes=True, _outputs=["inner"]),
            _allow_other_attributes=True,
            _outputs=["outer"],
        )

    def check(self, context: Any, x: ir.Value, inner: ir.Value, outer: ir.Value) -> Any:
        """Whether it is known what they do."""
        result = pattern.MatchResult()
        return result if _merged(inner, outer) else result.fail("an order is not known")

    def rewrite(self, op: Any, x: ir.Value, inner: ir.Value, outer: ir.Value) -> Any:
        """Both at once."""
        order = _merged(inner, outer)
        return op.Identity(x) if order == sorted(order) else op.Transpose(x, perm=order)


def _merged(inner: ir.Value, outer: ir.Value) -> list[int]:
    """The permutation of one after the other; empty when it is not known."""
    rank = len(_sizes(inner) or _sizes(outer))
    first, second = _permutation(inner.producer(), rank), _permutation(outer.producer(), rank)
    return [first[i] for i in second] if len(first) == len(second) else []


class StridedWrites(pattern.RewriteRuleClassBase):  # type: ignore[misc]
    """The last of several ScatterND along the first axis -> Concat and Reshape of the updates."""

    def __init__(self, graph: ir.Graph, left: list[Left]) -> None:
        super().__init__(STRIDED_WRITES)
        self.graph = graph
        self.left = left
        self.known: Numbers = {}
        self.found: tuple[list[ir.Node], Arrangement] | None = None

    def pattern(self, op: Any, data: Any, indices: Any, updates: Any) -> Any:
        """What is matched: any ScatterND; `check` finds those before it."""
        return op.ScatterND(
            data, indices, updates, _allow_other_attributes=True, _outputs=["written"]
        )

    def check(self, context: Any, written: ir.Value, **_: Any) -> Any:
        """Whether the writes that end here make up the tensor; if not, the reason is kept."""
        result, node = pattern.MatchResult(), written.producer()
        assert node is not None
        if any(_is_data_of(use, written) for use in _followers(written)):
            return result.fail("another write follows")
        chain = self._chain(node)
        found = self._arrangement(chain)
        if isinstance(found, str):
            self.left.append(Left(STRIDED_WRITES, node.name or written.name or "", found))
            return result.fail(found)
        self.found = chain, found
        return result

    def rewrite(self, op: Any, written: ir.Value, **_: Any) -> Any:
        """The tensor, made of the updates; transposes of all of them are taken out."""
        assert self.found is not None
        chain, arrangement = self.found
        updates = [chain[i].inputs[2] for i in arrangement.order]
        sizes = _sizes(written)
        order = _shared_permutation(updates, len(sizes))
        if order is None:
            return _assemble(op, updates, 0, sizes, arrangement)
        sources = [update.producer().inputs[0] for update in updates]  # type: ignore[union-attr]
        shape = [sizes[order.index(i)] for i in range(len(sizes))]
        made = _assemble(op, sources, order[0], shape, arrangement)
        return op.Transpose(made, perm=order)

    def _chain(self, last: ir.Node) -> list[ir.Node]:
        """The writes that end in this one, in order, back to where they cover the axis."""
        chain, covered = [last], set(self._indices(last) or ())
        size = _sizes(last.outputs[0])[:1]
        while (before := _written_before(chain[0])) is not None and [len(covered)] != size:
            chain.insert(0, before)
            covered |= set(self._indices(before) or ())
        return chain

    def _arrangement(self, chain: list[ir.Node]) -> Arrangement | str:
        """How the updates make up the tensor, or why the rule does not hold."""
        last = chain[-1]
        if last.graph is not self.graph:
            return INSIDE
        if (self.graph.opset_imports.get("") or 0) < _OLDEST_OPSET:
            return f"the graph's opset is older than {_OLDEST_OPSET}"
        sizes = _sizes(last.outputs[0])
        if not sizes or not all(isinstance(size, int) for size in sizes):
            return "its shape is not of numbers"
        parts: list[Part] = []
        for node in chain:
            part = self._part(node)
            if isinstance(part, str):
                return part
            parts.append(part)
        for node in chain[:-1]:
            for reader in _readers(node.outputs[0]):
                return f"{reader.name or reader.op_type} reads it between its writes"
        return arrange(sizes[0], parts)

    def _part(self, node: ir.Node) -> Part | str:
        reduction = node.attributes.get("reduction")
        if reduction is not None and reduction.as_string() != "none":
            return f"it is combined with what is there: reduction {reduction.as_string()}"
        indices = self._indices(node)
        if indices is None:
            return "its indices are no constants of the first axis alone"
        return part_of_indices(indices) or "its indices are not evenly spaced"

    def _indices(self, node: ir.Node) -> list[int] | None:
        """The indices [n, 1] of the first axis; None for others."""
        found = constant_of(node.inputs[1], self.known)
        if found is None or found.ndim != 2 or found.shape[1] != 1:
            return None
        size = _sizes(node.outputs[0])[:1]
        return [int(i) % size[0] if size and size[0] else int(i) for i in found[:, 0]]


def _assemble(
    op: Any, updates: Sequence[Any], axis: int, sizes: list[Any], arrangement: Arrangement
) -> Any:
    """Stack along a new axis and flatten it, or join."""
    if not arrangement.is_stack:
        return op.Concat(*updates, axis=axis)
    new = op.Constant(value_ints=[axis + 1])
    stacked = op.Concat(*(op.Unsqueeze(update, new) for update in updates), axis=axis + 1)
    return op.Reshape(stacked, op.Constant(value_ints=sizes))


def _sizes(value: ir.Value | None) -> list[Any]:
    """The value's sizes, numbers and names; empty when they are not known."""
    if value is None or value.shape is None:
        return []
    return [n if isinstance(n, int) else str(n) for n in value.shape]


def _permutation(node: ir.Node | None, rank: int) -> list[int]:
    """What a Transpose makes of the axes; empty for another node."""
    if node is None or node.op_type != "Transpose":
        return []
    stated = node.attributes.get("perm")
    return list(stated.as_ints()) if stated is not None else list(range(rank))[::-1]


def _shared_permutation(updates: Sequence[ir.Value | None], rank: int) -> list[int] | None:
    """The permutation by which each of the updates was transposed; None when they differ."""
    found = [_permutation(u.producer() if u is not None else None, rank) for u in updates]
    return found[0] if found[0] and all(one == found[0] for one in found) else None


def _written_before(node: ir.Node) -> ir.Node | None:
    """The ScatterND whose result a node writes to, past transposes that cancel."""
    value, order = node.inputs[0], list(range(len(_sizes(node.outputs[0]))))
    while value is not None and (source := value.producer()) is not None:
        if source.op_type == "ScatterND":
            return source if order == sorted(order) else None
        permutation = _permutation(source, len(order))
        if not permutation and source.op_type != "Identity":
            return None
        order = [permutation[i] for i in order] if permutation else order
        value = source.inputs[0]
    return None


def _followers(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """Each use of a value, past Identity and Transpose: the node and which input it is."""
    for node, index in value.uses():
        if node.op_type in ("Identity", "Transpose"):
            yield from _followers(node.outputs[0])
        else:
            yield node, index


def _is_data_of(use: tuple[ir.Node, int], written: ir.Value) -> bool:
    """Whether a use is a further write to the same tensor."""
    node, index = use
    return (
        node.op_type == "ScatterND" and index == 0 and _written_before(node) is written.producer()
    )


def _readers(value: ir.Value) -> Iterator[ir.Node]:
    """What reads a value's numbers; a further write does not, of another chain neither."""
    if value.is_graph_output():
        yield ir.node("output", [])
    for node, index in _followers(value):
        if node.op_type != "Shape" and not (node.op_type == "ScatterND" and index == 0):
            yield node


def rules(graph: ir.Graph, left: list[Left]) -> tuple[pattern.RewriteRuleSet, ...]:
    """The sets of rules, to be applied one after the other; reasons are added to left."""
    return (
        pattern.RewriteRuleSet([PlainCast.rule()]),
        pattern.RewriteRuleSet([StridedWrites.rule(graph, left)]),
        pattern.RewriteRuleSet([MergedTransposes.rule()]),
    )
