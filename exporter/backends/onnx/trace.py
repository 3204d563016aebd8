"""Trace the graph with torch.export at one geometry, with parameters that hold no memory."""

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram

from wanexport.graphs.wan import WanModel
from wanexport.runtime.bundle.signature import input_shapes
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.wan_config import WanConfig


def trace(config: WanConfig, geometry: Geometry, dtype: torch.dtype) -> ExportedProgram:
    """Export `WanModel` at exactly this geometry; every shape in the program is a constant."""
    with torch.device("meta"):
        model = WanModel(config, geometry, dtype)
    # The buffers (RoPE tables, frequencies) are real: they are small and belong to the graph.
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                setattr(module, name, nn.Parameter(empty, requires_grad=False))
        inputs = {
            name: torch.empty(shape) for name, shape in input_shapes(config, geometry).items()
        }
    return torch.export.export(model, (), inputs)
