"""A graph's calls as functions whose parameters are inputs: what is compiled ahead of time.

No weight is part of one, so a compiled block serves every layer, expert and fine-tune:

    writes = call(parameters, reads, state)

Arguments and results are lists in the order of the call's names. State is written in place, or in
the functional form, for what writes nothing, follows the writes as what it becomes.
"""

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram

from wanexport.graphs.graph import Graph, empty_tensor
from wanexport.runtime.program import Call, of_layer


class _Method(nn.Module):
    """One call of a graph, for its first layer."""

    def __init__(self, graph: Graph, call: Call, functional: bool) -> None:
        super().__init__()
        self.graph, self.call, self.functional = graph, call, functional

    def forward(self, reads: list[Tensor], state: list[Tensor]) -> tuple[Tensor, ...]:
        values = dict(zip(self.call.reads, reads, strict=True))
        given = [tensor.clone() for tensor in state] if self.functional else state
        kept = dict(zip(of_layer(self.call.state, 0), given, strict=True))
        written = self.graph.run_call(self.call, 0, values, kept)
        results = tuple(written[name] for name in self.call.writes)
        return (*results, *given) if self.functional else results


class _ParametersAsInputs(nn.Module):
    """A call as a function of its parameters; it registers none itself."""

    def __init__(self, graph: Graph, call: Call, functional: bool) -> None:
        super().__init__()
        self.__dict__["method"] = _Method(graph, call, functional)
        self.names = [f"graph.{name}" for name in of_layer(call.parameters, 0)]

    def forward(
        self, parameters: list[Tensor], reads: list[Tensor], state: list[Tensor]
    ) -> tuple[Tensor, ...]:
        named = dict(zip(self.names, parameters, strict=True))
        written: tuple[Tensor, ...] = torch.func.functional_call(
            self.__dict__["method"], named, (reads, state)
        )
        return written


def trace_calls(
    graph: Graph, device: str, names: Collection[str] | None = None, *, functional: bool = False
) -> dict[str, ExportedProgram]:
    """Export calls of an empty graph whose tables are on the device; None stands for all.

    A call that runs another's code is not exported.
    """
    return {
        call.name: _trace(graph, call, device, functional)
        for call in graph.program.calls
        if not call.code and (names is None or call.name in names)
    }


def _trace(graph: Graph, call: Call, device: str, functional: bool) -> ExportedProgram:
    program = graph.program
    specs = {**program.inputs, **program.values, **program.outputs}
    stored = [graph.get_parameter(name) for name in of_layer(call.parameters, 0)]
    with FakeTensorMode(allow_non_fake_inputs=True):
        parameters = [torch.empty(p.shape, dtype=p.dtype, device=device) for p in stored]
        reads = [empty_tensor(specs[name], graph.dtype, device) for name in call.reads]
        state = [empty_tensor(program.state[name], graph.dtype, device) for name in call.state]
    with torch.no_grad():
        module = _ParametersAsInputs(graph, call, functional)
        return torch.export.export(module, (parameters, reads, state))


def written_inputs(exported: ExportedProgram, num_state: int) -> tuple[str, ...]:
    """The names of the inputs that an exported graph may write: the last ones, its state."""
    inputs = [str(name) for name in exported.graph_signature.user_inputs]
    return tuple(inputs[len(inputs) - num_state :])
