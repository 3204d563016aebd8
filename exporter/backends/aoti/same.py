"""Whether the programs that packages are compiled from are the same at two sizes of video.

On a CPU the proof runs packages of fewer tokens. They stand for the engine's own only if nothing
but the token grid differs.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from wanexport.exporter.backends.grid import Grid, check_same
from wanexport.graphs.graph import empty_graph, torch_dtype
from wanexport.graphs.regions import trace_calls
from wanexport.runtime.geometry import Geometry

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def compare_programs(
    graph: str, config: "DataclassInstance", dtype: str, full: Geometry, small: Geometry
) -> dict[str, int]:
    """How many integers differ between a CPU's programs of two sizes, by `CALL OPERATOR`.

    Operators, their order and connections, dtypes and floating-point numbers are the same; a table
    of the token grid may have more rows. An integer that differs is the same multiple of a length
    of the grid at both sizes. Raises WanExportError, naming the first difference.
    """
    grid, found = Grid(full, small), dict[str, int]()
    programs = [
        trace_calls(empty_graph(graph, config, size, torch_dtype(dtype)), "cpu")
        for size in (full, small)
    ]
    check_same("the graph", *map(list, programs))
    for call, program in programs[0].items():
        for operator, count in _differing(call, program, programs[1][call], grid):
            found[f"{call} {operator}"] = found.get(f"{call} {operator}", 0) + count
    return {operator: count for operator, count in found.items() if count}


def _differing(
    call: str, full: ExportedProgram, small: ExportedProgram, grid: Grid
) -> Iterator[tuple[str, int]]:
    nodes = _nodes(full), _nodes(small)
    check_same(call, *map(len, nodes))
    numbers = [{node: i for i, node in enumerate(own)} for own in nodes]
    for one, two in zip(*nodes):
        values = [_flat((n.args, n.kwargs), own) for n, own in zip((one, two), numbers)]
        check_same(call, _described(one, values[0]), _described(two, values[1]))
        integers = [[v for v in own if type(v) is int] for own in values]
        yield str(one.target), grid.count_differing(call, *integers)
    tables = _tables(full), _tables(small)
    check_same(call, *(sorted((name, t.dtype) for name, t in own.items()) for own in tables))
    for name, table in tables[0].items():
        grid.check_table(call, _as_array(table), _as_array(tables[1][name]))


def _nodes(program: ExportedProgram) -> list[Node]:
    """Every node, those of branches and loops too."""
    modules = program.graph_module.modules()
    return [node for m in modules if isinstance(m, GraphModule) for node in m.graph.nodes]


def _described(node: Node, arguments: list[Any]) -> tuple[Any, ...]:
    """Operator, arguments but for the values of integers, and dtypes and ranks of results."""
    value = node.meta.get("val")
    values = value if isinstance(value, tuple | list) else [value]
    kinds = tuple((t.dtype, t.ndim) for t in values if isinstance(t, torch.Tensor))
    given = tuple((type(a).__name__, None if type(a) is int else a) for a in arguments)
    return node.op, str(node.target), given, kinds


def _flat(value: Any, numbers: Mapping[Node, int]) -> list[Any]:
    """Arguments in order, nodes by their numbers."""
    if isinstance(value, Node):
        return [("node", numbers[value])]
    if isinstance(value, Mapping):
        return [inner for name in value for inner in (name, *_flat(value[name], numbers))]
    if isinstance(value, tuple | list):
        return [(len(value),), *(inner for own in value for inner in _flat(own, numbers))]
    return [value]


def _tables(program: ExportedProgram) -> dict[str, torch.Tensor]:
    """Tensors that are part of a program."""
    tables = {**program.constants, **dict(program.named_buffers())}
    return {name: t for name, t in tables.items() if isinstance(t, torch.Tensor)}


def _as_array(table: torch.Tensor) -> np.ndarray:
    """A table whose numbers can be compared: NumPy has no bf16."""
    array: np.ndarray = (table.double() if table.is_floating_point() else table).numpy()
    return array
