"""Whether two graphs, lowered at two geometries, are one graph but for the token grid.

What a proof runs at a few tokens stands for the engine's own size only if nothing else differs.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from wanexport.runtime.errors import WanExportError
from wanexport.runtime.geometry import Geometry


def compare_graphs(full: bytes, small: bytes, sizes: tuple[Geometry, Geometry]) -> dict[str, int]:
    """How many integers differ between the functions of two ONNX files, by `CALL OPERATOR`.

    Operators, their order and connections, attributes, dtypes and floating-point constants are the
    same; a table of the token grid may have more rows. An integer that differs is the same multiple
    of a length of the grid at both sizes. Raises WanExportError, naming the first node that differs
    otherwise.
    """
    lengths = tuple(zip(*map(_lengths, sizes)))
    found: dict[str, int] = {}
    calls = _functions(full), _functions(small)
    for name, function in calls[0].items():
        pair = _Pair(name, function, calls[1][name], lengths)
        for operator, count in pair.differing():
            found[f"{name} {operator}"] = found.get(f"{name} {operator}", 0) + count
    return {operator: count for operator, count in found.items() if count}


def _functions(graph: bytes) -> dict[str, ir.Function]:
    """The calls of a graph that `assemble` made, by name."""
    model = ir.from_proto(onnx.load_model_from_string(graph))
    return {function.name: function for function in model.functions.values()}


def _lengths(geometry: Geometry) -> tuple[int, ...]:
    """What the token grid's sizes are made of: its sides, and products of neighbours."""
    frames, rows, columns = geometry.grid
    return (frames * rows * columns, frames * rows, rows * columns, frames, rows, columns)


@dataclass(frozen=True)
class _Pair:
    """One call at two sizes; `lengths` are those of the grid at both."""

    call: str
    full: ir.Function
    small: ir.Function
    lengths: tuple[tuple[int, int], ...]

    def differing(self) -> Iterator[tuple[str, int]]:
        """Operators with integers that differ, and how many; the nodes are compared in order."""
        nodes = list(self.full), list(self.small)
        self._check_same(len(nodes[0]), len(nodes[1]))
        numbers = [{id(v): i for i, v in enumerate(f.inputs)} for f in (self.full, self.small)]
        for one, two in zip(*nodes):
            self._check_same(_described(one, numbers[0]), _described(two, numbers[1]))
            yield one.op_type, sum(self._differing_attributes(one, two))
            for node, own in ((one, numbers[0]), (two, numbers[1])):
                own |= {id(value): len(own) + i for i, value in enumerate(node.outputs)}
        ends = [[n[id(v)] for v in f.outputs] for f, n in zip((self.full, self.small), numbers)]
        self._check_same(*ends)

    def _differing_attributes(self, full: ir.Node, small: ir.Node) -> Iterator[int]:
        for name, attribute in full.attributes.items():
            other = small.attributes[name]
            self._check_same(attribute.type, other.type)
            if attribute.type == ir.AttributeType.TENSOR:
                yield self._differing_constants(attribute.value, other.value)
            elif full.op_type == "Constant" and attribute.type == ir.AttributeType.INTS:
                yield self._differing_integers(attribute.value, other.value)
            else:  # integers of another operator say what it does
                one, two = (full.op_type, name, attribute.value), (small.op_type, name, other.value)
                self._check_same(one, two)

    def _differing_constants(self, full: Any, small: Any) -> int:
        self._check_same(full.dtype, small.dtype)
        one, two = full.numpy(), small.numpy()
        if one.dtype.kind in "iu":
            return self._differing_integers(one.ravel().tolist(), two.ravel().tolist())
        if one.ndim > 1 and one.shape[1:] == two.shape[1:]:  # a table of the grid
            rows = min(len(one), len(two))
            one, two = one[:rows], two[:rows]
        if not np.array_equal(one, two):
            raise self._differs(f"a constant of {one.flat[0]}", f"one of {two.flat[0]}")
        return 0

    def _differing_integers(self, full: Sequence[int], small: Sequence[int]) -> int:
        self._check_same(len(full), len(small))
        differing = [(a, b) for a, b in zip(full, small) if a != b]
        for one, two in differing:
            if not any(one * length[1] == two * length[0] for length in self.lengths):
                raise self._differs(f"the integer {one}", f"{two}, which is not of the token grid")
        return len(differing)

    def _check_same(self, one: Any, two: Any) -> None:
        if one != two:
            raise self._differs(str(one), str(two))

    def _differs(self, one: str, two: str) -> WanExportError:
        return WanExportError(
            f"{self.call} has {one:.120} at the engine's size and {two:.120} at the proof's: what "
            f"the proof runs is not this engine; please report this"
        )


def _described(node: ir.Node, numbers: Mapping[int, int]) -> tuple[Any, ...]:
    """Operator, inputs by number, and dtypes and ranks of outputs."""
    inputs = tuple(None if v is None else numbers[id(v)] for v in node.inputs)
    outputs = tuple((v.dtype, None if v.shape is None else len(v.shape)) for v in node.outputs)
    return node.domain, node.op_type, node.overload, inputs, outputs, sorted(node.attributes)
