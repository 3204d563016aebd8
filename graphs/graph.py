"""What every family's graph is: one module whose methods are the calls of a Program."""

from collections.abc import Collection, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from wanexport.runtime.bundle.signature import stays_fp32
from wanexport.runtime.dtypes import DTYPES
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.program import (
    ENGINE_DTYPE,
    LAYER,
    MOMENTS,
    Call,
    Program,
    TensorSpec,
    of_layer,
)
from wanexport.runtime.wan_config import WanConfig


def torch_dtype(name: str) -> torch.dtype:
    """PyTorch's dtype of our name for one."""
    dtype: torch.dtype = getattr(torch, DTYPES[name].torch)
    return dtype


def parameter_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the official code uses this parameter when it computes in `dtype`."""
    return torch.float32 if stays_fp32(name) else dtype


class Graph(nn.Module):
    """A model at one geometry and precision; every call of its Program is a method of that name,
    or of that of the call whose code it runs.

    A method takes what the call reads and its state by name, and returns what it writes by name.
    That of a repeated call takes the layer's index first, and its state without the index:
    `memory.{i}` is `memory`. State is written in place. A submodule may stand for a method. A
    module's parameters are read by its own forward and by no other, its tables are on `cpu`.
    `sizes` is the class of the config, which says what the model's sizes are.
    """

    sizes: type = WanConfig
    program: Program

    def __init__(
        self, config: Any, geometry: Geometry, dtype: torch.dtype, fused: bool = False
    ) -> None:
        super().__init__()
        self.config, self.geometry, self.dtype = config, geometry, dtype
        self.program = self.describe(config, geometry)

    @staticmethod
    def describe(config: Any, geometry: Geometry) -> Program:
        """The Program of these calls."""
        raise NotImplementedError

    @staticmethod
    def dtype_of(parameter: str, dtype: torch.dtype) -> torch.dtype:
        """The dtype of a parameter in a graph of this dtype."""
        return parameter_dtype(parameter, dtype)

    def freeze(self) -> None:
        """Round every parameter to its precision, and compute no gradients; last in `__init__`."""
        for name, parameter in self.named_parameters():
            parameter.data = parameter.data.to(self.dtype_of(name, self.dtype))
        self.eval().requires_grad_(False)

    def run(
        self,
        values: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
        moments: Collection[str] = MOMENTS,
    ) -> dict[str, Tensor]:
        """Run the calls of some moments in order; return the values with what they wrote.

        state has every tensor of `Program.states`, and is written in place.
        """
        known = dict(values)
        for call in self.program.calls:
            if call.when in moments:
                for index in call.numbers:
                    known |= self.run_call(call, index, known, state)
        return known

    def run_call(
        self, call: Call, index: int, values: Mapping[str, Tensor], state: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What a call writes for one layer."""
        given = {name: values[name] for name in call.reads}
        for name, own in zip(call.state, of_layer(call.state, index), strict=True):
            given[_without_layer(name)] = state[own]
        layer = (index,) if _has_layers(call) else ()
        written: dict[str, Tensor] = getattr(self, call.function)(*layer, **given)
        return written

    def forward(self, *, state: Sequence[Tensor] = (), **inputs: Tensor) -> Any:
        """The velocity [1, C, F, h, w] of the Program's inputs.

        state has the tensors of `Program.states` in its order. It is not written: what it becomes
        follows the velocity.
        """
        kept = {n: t.clone() for n, t in zip(self.program.states(), state, strict=True)}
        known = self.run(inputs, kept)
        (velocity,) = (known[name] for name in self.program.outputs)
        return (velocity, *kept.values()) if kept else velocity


def _has_layers(call: Call) -> bool:
    """Whether a call runs once a layer, be it that there is one layer."""
    return call.repeat > 1 or any(LAYER in name for name in (*call.parameters, *call.state))


def _without_layer(name: str) -> str:
    return name.replace(f".{LAYER}", "").replace(LAYER, "")


def load_graph(reference: str) -> type[Graph]:
    """The class that a family names as `module:Class`."""
    module, _, name = reference.partition(":")
    found = getattr(import_module(module), name)
    if not issubclass(found, Graph):
        raise TypeError(f"{reference} is no Graph")
    return found


def empty_graph(
    reference: str,
    config: Any,
    geometry: Geometry,
    dtype: torch.dtype,
    *,
    device: str = "cpu",
    fused: bool = False,
) -> Graph:
    """A family's graph whose parameters hold no memory; its tables, small ones, are on the device.

    fused takes kernels of our own where the family has any, for CUDA.
    """
    with torch.device("meta"):
        graph = load_graph(reference)(config, geometry, dtype, fused=fused)
    for module in graph.modules():
        for name, table in module.named_buffers(recurse=False):
            module.register_buffer(name, table.to(device), persistent=False)
    return graph


def empty_tensor(spec: TensorSpec, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """A tensor of a Program in a graph of this dtype; its content is whatever was in memory."""
    own = dtype if spec.dtype == ENGINE_DTYPE else torch_dtype(spec.dtype)
    return torch.empty(spec.shape, dtype=own, device=device)
