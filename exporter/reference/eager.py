"""Eager PyTorch as an engine: what every compiled engine is compared with."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from wanexport.graphs.checkpoint import SourceTensor
from wanexport.graphs.wan import WanModel, parameter_dtype
from wanexport.graphs.weights import DTYPES, read_tensor
from wanexport.runtime.bundle.signature import parameter_shapes
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.wan_config import WanConfig


class EagerEngine:
    """The graph in eager PyTorch on a device, with tensors from a file; fp32 in and out.

    `tensors` says where each parameter lies. Each is rounded to `rounded` (fp32, bf16 or fp16: the
    dtype of a bundle's weights) and then cast to the graph's own dtype: a reference in fp32 upcasts
    bf16 weights. Unless `resident`, each module reads its parameters when it runs and drops them
    after it, so that a forward takes the memory of one module instead of the model's.
    """

    def __init__(
        self,
        config: WanConfig,
        geometry: Geometry,
        dtype: str,
        tensors: Mapping[str, SourceTensor],
        *,
        rounded: str = "fp32",
        resident: bool = True,
        device: str = "cpu",
    ) -> None:
        self.tensors, self.dtype, self.rounded = tensors, DTYPES[dtype], DTYPES[rounded]
        self.device = device
        with torch.device("meta"):
            self.model = WanModel(config, geometry, self.dtype)
        for module in self.model.modules():
            for name, table in module.named_buffers(recurse=False):
                module.register_buffer(name, table.to(device), persistent=False)
        for prefix, module in self.model.named_modules():
            if resident:
                self._read(prefix, module)
            elif next(module.parameters(recurse=False), None) is not None:
                module.register_forward_pre_hook(partial(self._read, prefix))
                module.register_forward_hook(_drop)

    def _read(self, prefix: str, module: nn.Module, *_hook_arguments: Any) -> None:
        """Give the module its own parameters, not those of its children."""
        for name, _ in module.named_parameters(recurse=False):
            full = f"{prefix}.{name}" if prefix else name
            rounded = parameter_dtype(full, self.rounded)
            tensor = read_tensor(self.tensors[full], fits=rounded).to(self.device).to(rounded)
            _set(module, name, tensor.to(parameter_dtype(full, self.dtype)))

    def __call__(self, inputs: Mapping[str, Any]) -> Any:
        """Run the model and return its velocity: numpy for numpy, a tensor for tensors."""
        given = {name: torch.as_tensor(value).to(self.device) for name, value in inputs.items()}
        with torch.no_grad():
            velocity = self.model(**given)
        return velocity if isinstance(inputs["latent"], Tensor) else velocity.cpu().numpy()


def _drop(module: nn.Module, *_hook_arguments: Any) -> None:
    for name, parameter in module.named_parameters(recurse=False):
        _set(module, name, parameter.to("meta"))


def _set(module: nn.Module, name: str, tensor: Tensor) -> None:
    setattr(module, name, nn.Parameter(tensor, requires_grad=False))


def cut_to_ends(config: WanConfig) -> WanConfig:
    """The config with only the first and the last block."""
    return replace(config, num_layers=min(2, config.num_layers))


def tensors_of_cut(cut: WanConfig, full: WanConfig) -> dict[str, str]:
    """The full model's name for each parameter of the cut, whose last block is the last there."""
    last = (f"blocks.{cut.num_layers - 1}.", f"blocks.{full.num_layers - 1}.")
    return {name: name.replace(*last) for name in parameter_shapes(cut)}
