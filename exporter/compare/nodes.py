"""Inside a faulty call of an ONNX engine: the first value whose error exceeds its floor.

PyTorch's exporter keeps the names of the traced values. So the call is traced as it was for the
engine, its values are computed node by node, in fp32 and in the engine's precision, and held
against those that the engine's own nodes compute.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Interpreter, Node
from torch.fx.node import map_aggregate

from wanexport.exporter.backends.onnx.cut import Inside, look_inside, with_taps
from wanexport.exporter.backends.onnx.lower import decomposed, for_onnx_runtime
from wanexport.exporter.compare.bisect import Place, Visited, distance, figures, rounding
from wanexport.exporter.compare.steppers import EagerStepper, OnnxStepper
from wanexport.exporter.reference.parity import Parity
from wanexport.graphs.graph import empty_graph, parameter_dtype, torch_dtype
from wanexport.graphs.regions import trace_calls
from wanexport.runtime.family import family_of
from wanexport.runtime.machine.memory import free_bytes
from wanexport.runtime.program import ENGINE_DTYPE, of_layer

_NUMBER = re.compile(r"_\d+$")  # which tells values of one operator apart
_SHARE = 16  # of the free memory, one part is what the values take that are tapped at a time
Row = dict[str, Any]


def inside(engine: OnnxStepper, exact: EagerStepper, visited: Visited) -> dict[str, Any]:
    """The values inside a call in order, up to those tapped with the first whose error exceeds.

    exact is the graph in fp32 with the right parameters. `first` in the result has the value, the
    nodes that compute it from what was right, and their parameters.
    """
    place = visited.place
    traced = _Traced.of(engine.dtype, exact, place)
    cut = engine.cut(place.call, place.index)
    looked = look_inside(cut)
    rows: list[Row] = []
    for group in _groups(traced, looked, exact.engine.device):
        rows += _compared(engine, exact, visited, traced, looked, group)
        if not all(row["passed"] for row in rows):
            break
    first = next((row for row in rows if not row["passed"]), None)
    return {
        "call": place.name,
        "values": rows,
        "first": None if first is None else _described(first, rows, looked),
    }


@dataclass(frozen=True)
class _Traced:
    """A call as it is traced for an engine: the program, and the dtype of its low precision."""

    program: ExportedProgram
    dtype: torch.dtype
    place: Place

    @classmethod
    def of(cls, dtype: str, exact: EagerStepper, place: Place) -> "_Traced":
        """Trace a call anew for an engine of a dtype."""
        model, low = exact.engine.model, torch_dtype(dtype)
        empty = empty_graph(family_of(model.config).graph, model.config, model.geometry, low)
        name = place.call.name
        traced = trace_calls(empty, "cpu", [name], functional=True)[name]
        return cls(decomposed(traced, for_onnx_runtime(dtype, "native")), low, place)

    def values(self) -> Iterator[tuple[str, Tensor]]:
        """The name of every floating-point value that a node computes, and one of its kind.

        A value that is called like an end of the call has got another name in ONNX: it is left out.
        """
        ends = {*self.place.call.reads, *self.place.call.writes}
        for node in self.program.graph.nodes:
            if _NUMBER.sub("", node.name) in ends:
                continue
            kind = node.meta.get("val")
            if (
                node.op == "call_function"
                and isinstance(kind, Tensor)
                and kind.dtype.is_floating_point
            ):
                yield node.name, kind

    def low_values(self) -> set[str]:
        """The names of those that are kept in a low precision."""
        return {name for name, kind in self.values() if kind.dtype != torch.float32}

    def run(
        self, exact: EagerStepper, visited: Visited, keep: Collection[str], *, wide: bool
    ) -> dict[str, Tensor]:
        """Some values of the call, in fp32; wide computes all of it so."""
        device = torch.device(exact.engine.device)
        runner = _Runner(self, keep, device, wide)
        with torch.no_grad():
            runner.run(*self._arguments(exact, visited, runner.placed))
        return runner.kept

    def _arguments(
        self, exact: EagerStepper, visited: Visited, placed: Callable[[Tensor], Tensor]
    ) -> Iterator[Tensor]:
        """What the program takes: parameters, reads and state, and its own tables among them."""
        call, index = self.place.call, self.place.index
        specs = {**exact.program.inputs, **exact.program.values}
        user = [
            placed(exact.engine.parameter(name).to(parameter_dtype(name, self.dtype)))
            for name in of_layer(call.parameters, index)
        ]
        for name in (*call.reads, *of_layer(call.state, index)):
            low = name in specs and specs[name].dtype == ENGINE_DTYPE
            user.append(placed(visited.given[name].to(self.dtype if low else torch.float32)))
        remaining = iter(user)
        tables = {**self.program.constants, **dict(self.program.named_buffers())}
        for spec in self.program.graph_signature.input_specs:
            is_user = spec.kind == InputKind.USER_INPUT
            yield next(remaining) if is_user else placed(tables[str(spec.target)])


class _Runner(Interpreter):
    """Runs a traced program on a device and keeps some values; wide makes low precisions fp32."""

    def __init__(
        self, traced: _Traced, keep: Collection[str], device: torch.device, wide: bool
    ) -> None:
        super().__init__(traced.program.graph_module)
        self.low, self.keep, self.device, self.wide = traced.dtype, keep, device, wide
        self.kept: dict[str, Tensor] = {}

    def placed(self, value: Tensor) -> Tensor:
        """A tensor on the device, in fp32 where the program runs so."""
        is_low = self.wide and value.dtype == self.low
        return value.to(self.device, torch.float32 if is_low else value.dtype)

    def fetch_args_kwargs_from_env(self, n: Node) -> Any:
        """A node's arguments, its devices and precisions replaced."""
        return map_aggregate(super().fetch_args_kwargs_from_env(n), self._replaced)

    def _replaced(self, argument: Any) -> Any:
        if isinstance(argument, torch.device):
            return self.device
        return torch.float32 if self.wide and argument is self.low else argument

    def run_node(self, n: Node) -> Any:
        """Run a node, and keep its value where that was asked for."""
        result = super().run_node(n)
        if n.name in self.keep:
            self.kept[n.name] = result.float()
        return result


def _groups(traced: _Traced, looked: Inside, device: str) -> list[dict[str, Sequence[int]]]:
    """The values that both have, in order, in groups that fit in memory: name to shape."""
    room = free_bytes(device) // _SHARE
    groups: list[dict[str, Sequence[int]]] = [{}]
    size = 0
    for name, kind in traced.values():
        if name in looked.called:
            size += 4 * kind.numel()
            if groups[-1] and size > room:
                groups.append({})
                size = 4 * kind.numel()
            groups[-1][name] = tuple(kind.shape)
    return groups


def _compared(
    engine: OnnxStepper,
    exact: EagerStepper,
    visited: Visited,
    traced: _Traced,
    looked: Inside,
    group: Mapping[str, Sequence[int]],
) -> list[Row]:
    """A row for each value of a group, in the order of the trace."""
    tapped = with_taps(looked.cut, {looked.called[name]: shape for name, shape in group.items()})
    found = engine.run_cut(tapped, visited.given)[len(tapped.outputs) :]
    right = traced.run(exact, visited, group, wide=True)
    rounded = traced.run(exact, visited, group, wide=False) if engine.dtype != "fp32" else {}
    rows = []
    for name, value in zip(group, found, strict=True):
        floor = distance(rounded[name], right[name]) if rounded else None
        # Kept in the low precision, it may be rounded once more than eager PyTorch does.
        others = (rounding(right[name], traced.dtype),) if name in traced.low_values() else ()
        parity = Parity(distance(value, right[name]), floor, others)
        rows.append({"value": name, **figures(parity)})
    return rows


def _described(first: Row, rows: Sequence[Row], looked: Inside) -> dict[str, Any]:
    """The first value in excess, and the nodes that compute it from those before it."""
    good = [looked.called[row["value"]] for row in rows[: rows.index(first)]]
    nodes = looked.between(looked.called[first["value"]], good)
    stored = set(looked.cut.parameters)
    return {
        "value": first["value"],
        "operators": [node.op_type for node in nodes],
        "nodes": [node.output[0] for node in nodes],
        "parameters": sorted({name for node in nodes for name in node.input if name in stored}),
    }
