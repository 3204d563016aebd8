"""Whether two graphs, lowered at two geometries, are one graph but for the token grid.

What a proof runs at a few tokens stands for the engine's own size only if nothing else differs.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from wanexport.exporter.backends.grid import Grid, check_same
from wanexport.runtime.geometry import Geometry

_CONSTANT = "Constant"


def compare_graphs(full: bytes, small: bytes, sizes: tuple[Geometry, Geometry]) -> dict[str, int]:
    """How many integers differ between two ONNX files that `assemble` made, by `CALL OPERATOR`.

    They call the same functions in the same order, be it for more layers. In these, inputs,
    operators, their order and connections, attributes, dtypes and floating-point constants are the
    same; a table of the token grid may have more rows. An integer that differs is the same multiple
    of a length of the grid at both sizes. Raises WanExportError, naming the first difference.
    """
    grid = Grid(*sizes)
    found: dict[str, int] = {}
    models = onnx.load_model_from_string(full), onnx.load_model_from_string(small)
    check_same("the graph", *map(_order, models))
    functions = [{function.name: function for function in model.functions} for model in models]
    check_same("the graph", *map(sorted, functions))
    for name, function in functions[0].items():
        other = functions[1][name]
        check_same(name, _signature(function), _signature(other))
        pair = _Pair(name, ir.from_proto(function), ir.from_proto(other), grid)
        for operator, count in pair.differing():
            found[f"{name} {operator}"] = found.get(f"{name} {operator}", 0) + count
    return {operator: count for operator, count in found.items() if count}


def _order(model: onnx.ModelProto) -> list[tuple[str, str]]:
    """The functions that a graph calls in their order; one for several layers is there once."""
    return [
        called for called, _ in groupby((node.domain, node.op_type) for node in model.graph.node)
    ]


def _signature(function: onnx.FunctionProto) -> tuple[Any, ...]:
    """Names and dtypes of a function's inputs, names of its outputs, and its opsets."""
    dtypes = {info.name: info.type.tensor_type.elem_type for info in function.value_info}
    inputs = [(name, dtypes.get(name)) for name in function.input]
    opsets = sorted((opset.domain, opset.version) for opset in function.opset_import)
    return inputs, list(function.output), opsets


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
            yield one.op_type, sum(self._differing_constants(one.inputs, two.inputs))
            for node, own in ((one, numbers[0]), (two, numbers[1])):
                own |= {id(value): len(own) + i for i, value in enumerate(node.outputs)}
        ends = self.full.outputs, self.small.outputs
        check_same(self.call, *(_numbered(own, n) for own, n in zip(ends, numbers)))
        yield "output", sum(self._differing_constants(*ends))

    def _check_attributes(self, full: ir.Node, small: ir.Node) -> None:
        """All attributes of an operator say what it does."""
        for name, attribute in full.attributes.items():
            other = small.attributes[name]
            own = (full.op_type, name, *_content(attribute))
            check_same(self.call, own, (small.op_type, name, *_content(other)))

    def _differing_constants(
        self, full: Sequence[ir.Value | None], small: Sequence[ir.Value | None]
    ) -> Iterator[int]:
        """How many integers differ in each constant among values that are numbered alike."""
        for value, other in zip(full, small):
            one, two = _constant(value), _constant(other)
            if one is not None and two is not None:
                if one.dtype.kind in "iu":
                    check_same(self.call, (one.dtype, one.shape), (two.dtype, two.shape))
                    integers = one.ravel().tolist(), two.ravel().tolist()
                    yield self.grid.count_differing(self.call, *integers)
                else:
                    self.grid.check_table(self.call, one, two)


def _described(node: ir.Node, numbers: Mapping[int, int]) -> tuple[Any, ...]:
    """Operator, inputs by number, dtypes and ranks of outputs, and names of attributes."""
    outputs = tuple((v.dtype, None if v.shape is None else len(v.shape)) for v in node.outputs)
    operator = node.domain, node.op_type, node.overload
    return *operator, _numbered(node.inputs, numbers), outputs, sorted(node.attributes)


def _numbered(values: Sequence[ir.Value | None], numbers: Mapping[int, int]) -> list[Any]:
    """Which values these are; a constant says so, one that is left out is None."""
    return [
        None if value is None else _CONSTANT if _constant(value) is not None else numbers[id(value)]
        for value in values
    ]


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
