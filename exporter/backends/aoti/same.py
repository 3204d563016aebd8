"""Whether the programs that packages are compiled from are the same at two sizes of video.

On a CPU the proof runs packages of fewer tokens. They stand for the engine's own only if nothing
but the token grid differs.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from wanexport.exporter.backends.grid import Grid, check_same, check_table
from wanexport.graphs.graph import empty_graph, torch_dtype
from wanexport.graphs.regions import trace_calls
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.wan_config import WanConfig


def compare_programs(
    graph: str, config: WanConfig, dtype: str, full: Geometry, small: Geometry
) -> dict[str, int]:
    """How many integers differ between a CPU's programs of two sizes, by `CALL OPERATOR`.

    Operators, their order and connections, dtypes and floating-point numbers are the same; a table
    of the token grid may have more rows. Raises WanExportError, naming the first difference.
    """
    grid, found = Grid(full, small), dict[str, int]()
    programs = [
        trace_calls(empty_graph(graph, config, size, torch_dtype(dtype)), "cpu")
        for size in (full, small)
    ]
    for call, program in programs[0].items():
        for operator, count in _differing(call, program, programs[1][call], grid):
            found[f"{call} {operator}"] = found.get(f"{call} {operator}", 0) + count
    return {operator: count for operator, count in found.items() if count}


def _differing(
    call: str, full: ExportedProgram, small: ExportedProgram, grid: Grid
) -> Iterator[tuple[str, int]]:
    nodes = list(full.graph.nodes), list(small.graph.nodes)
    check_same(call, *map(len, nodes))
    numbers = [{node: i for i, node in enumerate(own)} for own in nodes]
    for one, two in zip(*nodes):
        values = [_flat((n.args, n.kwargs), own) for n, own in zip((one, two), numbers)]
        integers = [[v for v in own if type(v) is int] for own in values]
        others = [[v for v in own if type(v) is not int] for own in values]
        check_same(call, _described(one, others[0]), _described(two, others[1]))
        yield str(one.target), grid.count_differing(call, *integers)
    for name, table in _tables(full).items():
        check_table(call, table.numpy(), _tables(small)[name].numpy())


def _described(node: Node, arguments: list[Any]) -> tuple[Any, ...]:
    """Operator, arguments that are no integers, and dtypes and ranks of results."""
    value = node.meta.get("val")
    values = value if isinstance(value, tuple | list) else [value]
    kinds = tuple((t.dtype, t.ndim) for t in values if isinstance(t, torch.Tensor))
    return node.op, str(node.target), tuple(arguments), kinds


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
