"""The model in three regions whose parameters are inputs: embedding, one block, head.

A compiled block serves every block, expert and fine-tune, since no weight is part of it:

    x, time, *conditioning = embed(parameters, inputs)
    x = block(parameters, [x, *conditioning])         for every block
    velocity = head(parameters, [x, time])
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram

from wanexport.graphs.wan import Block, Conditioning, WanModel, parameter_dtype
from wanexport.runtime.bundle.signature import (
    REGIONS,
    input_shapes,
    parameter_shapes,
    region_parameters,
)
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.wan_config import WanConfig


class _Embed(nn.Module):
    def __init__(self, model: WanModel, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        x, time, cond = self.model.embed(**dict(zip(self.names, inputs, strict=True)))
        return x, time, *(tensor for tensor in cond if tensor is not None)


class _Block(nn.Module):
    def __init__(self, model: WanModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, *conditioning: Tensor) -> Tensor:
        block: Tensor = self.model.blocks[0](x, Conditioning(*conditioning))
        return block


class _Head(nn.Module):
    def __init__(self, model: WanModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.model.unpatchify(self.model.head(x, time))


class _ParametersAsInputs(nn.Module):
    """A region as a function of its parameters; it registers none itself."""

    def __init__(self, region: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.__dict__["region"] = region
        self.names = [f"model.{name}" for name in names]

    def forward(self, parameters: list[Tensor], inputs: list[Tensor]) -> Any:
        named = dict(zip(self.names, parameters, strict=True))
        return torch.func.functional_call(self.__dict__["region"], named, tuple(inputs))


def trace_regions(
    config: WanConfig,
    geometry: Geometry,
    dtype: torch.dtype,
    device: str,
    block: Callable[[WanConfig], Block] = Block,
    regions: Sequence[str] = REGIONS,
) -> dict[str, ExportedProgram]:
    """Export regions at this geometry for `device`; no parameter holds memory.

    block makes the block that stands for all: `Block`, or one with the same parameters and result.
    """
    with torch.device("meta"):
        model = WanModel(config, geometry, dtype, block=block)
    for module in model.modules():  # the tables are real: they are small and part of the graph
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, buffer.to(device), persistent=False)
    shapes = parameter_shapes(config)
    inputs = input_shapes(config, geometry)
    names = region_parameters(config)
    modules = {"embed": _Embed(model, tuple(inputs)), "block": _Block(model), "head": _Head(model)}

    def fake(shape: Sequence[int], as_dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=as_dtype, device=device)

    programs = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        given: dict[str, list[Tensor]] = {
            "embed": [fake(shape, torch.float32) for shape in inputs.values()]
        }
        for region in REGIONS:
            parameters = [fake(shapes[n], parameter_dtype(n, dtype)) for n in names[region]]
            module = _ParametersAsInputs(modules[region], names[region])
            if region == "embed":
                x, time, *conditioning = module(parameters, given["embed"])
                given |= {"block": [x, *conditioning], "head": [x, time]}
            programs[region] = (module, (parameters, given[region]))
    with torch.no_grad():
        return {name: torch.export.export(*programs[name]) for name in regions}
