"""Trace a whole graph with torch.export, with parameters that hold no memory."""

from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram

from wanexport.graphs.graph import Graph, empty_tensor


def trace(graph: Graph) -> ExportedProgram:
    """Export an empty graph on the CPU at its geometry; every shape in the program is a constant.

    The inputs are the Program's, and after them its state.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in graph.modules():
            for name, parameter in module.named_parameters(recurse=False):
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                setattr(module, name, nn.Parameter(empty, requires_grad=False))
        given: dict[str, Any] = {
            name: empty_tensor(spec, graph.dtype) for name, spec in graph.program.inputs.items()
        }
        state = [empty_tensor(spec, graph.dtype) for spec in graph.program.states().values()]
    return torch.export.export(graph, (), {**given, "state": state} if state else given)
