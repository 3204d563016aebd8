"""Whether two graphs, lowered at two geometries, are one graph but for the token grid.

What a proof runs at a few tokens stands for the engine's own size only if nothing else differs.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from wanexport.exporter.backends.grid import Grid, check_same, check_table
from wanexport.runtime.geometry import Geometry

_CONSTANT = "Constant"


def compare_graphs(full: bytes, small: bytes, sizes: tuple[Geometry, Geometry]) -> dict[str, int]:
    """How many integers differ between the functions of two ONNX files, by `CALL OPERATOR`.

    Operators, their order and connections, attributes, dtypes and floating-point constants are the
    same; a table of the token grid may have more rows. An integer that differs is the same multiple
    of a length of the grid at both sizes. Raises WanExportError, naming the first node that differs
    otherwise.
    """
    grid = Grid(*sizes)
    found: dict[str, int] = {}
    calls = _functions(full), _functions(small)
    for name, function in calls[0].items():
        pair = _Pair(name, function, calls[1][name], grid)
        for operator, count in pair.differing():
            found[f"{name} {operator}"] = found.get(f"{name} {operator}", 0) + count
    return {operator: count for operator, count in found.items() if count}


def _functions(graph: bytes) -> dict[str, ir.Function]:
    """The calls of a graph that `assemble` made, by name."""
    model = ir.from_proto(onnx.load_model_from_string(graph))
    return {function.name: function for function in model.functions.values()}


@dataclass(frozen=True)
class _Pair:
    """One call at two sizes of the token grid."""

    call: str
    full: ir.Function
    small: ir.Function
    grid: Grid

    def differing(self) -> Iterator[tuple[str, int]]:
        """Operators with integers that differ, and how many; the nodes are compared in order."""
        nodes = [[n for n in f if n.op_type != _CONSTANT] for f in (self.full, self.small)]
        check_same(self.call, *map(len, nodes))
        numbers = [{id(v): i for i, v in enumerate(f.inputs)} for f in (self.full, self.small)]
        for one, two in zip(*nodes):
            check_same(self.call, _described(one, numbers[0]), _described(two, numbers[1]))
            self._check_attributes(one, two)
            yield one.op_type, sum(self._differing_inputs(one, two))
            for node, own in ((one, numbers[0]), (two, numbers[1])):
                own |= {id(value): len(own) + i for i, value in enumerate(node.outputs)}
        ends = [[n[id(v)] for v in f.outputs] for f, n in zip((self.full, self.small), numbers)]
        check_same(self.call, *ends)

    def _check_attributes(self, full: ir.Node, small: ir.Node) -> None:
        """All attributes of an operator say what it does."""
        for name, attribute in full.attributes.items():
            other = small.attributes[name]
            own = (full.op_type, name, *_content(attribute))
            check_same(self.call, own, (small.op_type, name, *_content(other)))

    def _differing_inputs(self, full: ir.Node, small: ir.Node) -> Iterator[int]:
        """How many integers differ in each constant that the nodes read."""
        for one, two in zip(full.inputs, small.inputs):
            if (own := _constant(one)) is not None:
                other = _constant(two)
                assert other is not None  # both are described as constants
                yield self._differing_constants(own, other)

    def _differing_constants(self, one: np.ndarray, two: np.ndarray) -> int:
        check_same(self.call, (one.dtype, one.ndim), (two.dtype, two.ndim))
        if one.dtype.kind in "iu":
            integers = one.ravel().tolist(), two.ravel().tolist()
            return self.grid.count_differing(self.call, *integers)
        check_table(self.call, one, two)
        return 0


def _described(node: ir.Node, numbers: Mapping[int, int]) -> tuple[Any, ...]:
    """Operator, inputs by number, and dtypes and ranks of outputs."""
    inputs = tuple(
        _CONSTANT if _constant(v) is not None else None if v is None else numbers[id(v)]
        for v in node.inputs
    )
    outputs = tuple((v.dtype, None if v.shape is None else len(v.shape)) for v in node.outputs)
    return node.domain, node.op_type, node.overload, inputs, outputs, sorted(node.attributes)


def _content(attribute: ir.Attr) -> tuple[Any, ...]:
    """The type of an attribute and its value, so that they can be compared."""
    value = attribute.value
    if attribute.type == ir.AttributeType.TENSOR:
        return attribute.type, value.dtype, tuple(value.shape), value.tobytes()
    return attribute.type, tuple(value) if isinstance(value, list | tuple) else value


def _constant(value: ir.Value | None) -> np.ndarray | None:
    """What a Constant gives; None for any other value."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != _CONSTANT:
        return None
    (attribute,) = node.attributes.values()
    content = attribute.value
    array: np.ndarray = content.numpy() if hasattr(content, "numpy") else np.asarray(content)
    return array
