"""Eager PyTorch as an engine: what every compiled engine is compared with."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from wanexport.graphs.graph import empty_graph, parameter_dtype, torch_dtype
from wanexport.graphs.source_tensor import SourceTensor
from wanexport.graphs.weights import DTYPES, bundle_tensors, read_tensor
from wanexport.runtime.arrays import Array
from wanexport.runtime.bundle.pinned_file import PinnedFile
from wanexport.runtime.engines.device import to_device, zero_state
from wanexport.runtime.engines.engine import CLOSED, Memory
from wanexport.runtime.errors import EngineFailure
from wanexport.runtime.family import family_of
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.program import Program, of_layer
from wanexport.runtime.wan_config import WanConfig


class EagerEngine:
    """The graph in eager PyTorch on a device, with tensors from a file; fp32 in and out.

    `tensors` says where each parameter lies. Each is rounded to `rounded` (fp32, bf16 or fp16: the
    dtype of a bundle's weights) and then cast to the graph's own dtype: a reference in fp32 upcasts
    bf16 weights. Unless `resident`, each module reads its parameters when it runs and drops them
    after it, so that a forward takes the memory of one module instead of the model's. `graph` names
    the class of the graph, by default the family's.
    """

    def __init__(
        self,
        config: WanConfig,
        geometry: Geometry,
        dtype: str,
        tensors: Mapping[str, SourceTensor],
        *,
        graph: str | None = None,
        rounded: str = "fp32",
        resident: bool = True,
        device: str = "cpu",
    ) -> None:
        self.tensors, self.dtype, self.rounded = tensors, DTYPES[dtype], DTYPES[rounded]
        self.device, self.resident = device, resident
        reference = graph or family_of(config).graph
        self.model = empty_graph(reference, config, geometry, self.dtype, device=device)
        self._file: PinnedFile | None = None
        self._is_open = True
        self._read_resident()
        for prefix, module in self.model.named_modules():
            if not self._stays(module) and _has_own(module):
                module.register_forward_pre_hook(partial(self._read, prefix))
                module.register_forward_hook(_drop)

    def _stays(self, module: nn.Module) -> bool:
        """Whether a module keeps its parameters; nobody calls the graph itself as a module."""
        return self.resident or module is self.model

    def _read_resident(self) -> None:
        for prefix, module in self.model.named_modules():
            if self._stays(module):
                self._read(prefix, module)

    def _read(self, prefix: str, module: nn.Module, *_hook_arguments: Any) -> None:
        """Give the module its own parameters, not those of its children."""
        for name, _ in module.named_parameters(recurse=False):
            _set(module, name, self.parameter(f"{prefix}.{name}" if prefix else name))

    def parameter(self, name: str) -> Tensor:
        """A parameter on the device, rounded and cast, read from its file."""
        rounded = parameter_dtype(name, self.rounded)
        tensor = read_tensor(self.tensors[name], fits=rounded).to(self.device).to(rounded)
        return tensor.to(parameter_dtype(name, self.dtype))

    def array(self, value: Array) -> Tensor:
        """An fp32 tensor on the device."""
        return to_device(value, torch.device(self.device))

    def memory(self) -> Memory:
        """What a new session keeps: a state of zeros."""
        return Memory(zero_state(self.model.program, self.dtype, torch.device(self.device)))

    def _input(self, name: str, value: Array) -> Tensor:
        """An input on the device, in the dtype that the Program says."""
        dtype = torch_dtype(self.model.program.inputs[name].dtype)
        return to_device(value, torch.device(self.device), dtype)

    def use(self, weights: PinnedFile) -> None:
        """Read parameters from another file of a bundle, by their official names."""
        if weights != self._file:
            self.tensors = bundle_tensors(weights.path, {name: name for name in self.tensors})
            self._file = weights
            self._read_resident()

    def close(self) -> None:
        """Let go of the parameters; a call then raises EngineFailure."""
        self._is_open = False
        for module in self.model.modules():
            _drop(module)

    def __call__(
        self,
        inputs: Mapping[str, Any],
        weights: PinnedFile | None = None,
        memory: Memory | None = None,
        moment: str = "step",
    ) -> Any:
        """Run the Program's calls and return the velocity: numpy for numpy, a tensor for tensors.

        A commit gives None.

        Raises EngineFailure after `close`.
        """
        if not self._is_open:
            raise EngineFailure(CLOSED)
        if weights is not None:
            self.use(weights)
        memory = self.memory() if memory is None else memory
        given = {name: self._input(name, value) for name, value in inputs.items()}
        with torch.no_grad():
            if memory.values is None or memory.weights != weights:
                known = self.model.run(given, memory.state, ("prompt",))
                memory.values = {n: value for n, value in known.items() if n not in given}
                memory.weights = weights
            known = self.model.run({**given, **memory.values}, memory.state, (moment,))
        if moment == "commit":
            return None
        (velocity,) = (known[name] for name in self.model.program.outputs)
        is_torch = any(isinstance(value, Tensor) for value in inputs.values())
        return velocity if is_torch else velocity.cpu().numpy()


def _has_own(module: nn.Module) -> bool:
    """Whether a module has parameters of its own, beside its children's."""
    return next(module.parameters(recurse=False), None) is not None


def _drop(module: nn.Module, *_hook_arguments: Any) -> None:
    for name, parameter in module.named_parameters(recurse=False):
        _set(module, name, parameter.to("meta"))


def _set(module: nn.Module, name: str, tensor: Tensor) -> None:
    setattr(module, name, nn.Parameter(tensor, requires_grad=False))


def cut_to_ends(config: WanConfig) -> WanConfig:
    """The config with only the first and the last layer."""
    return replace(config, num_layers=min(2, config.num_layers))


def tensors_of_cut(cut: Program, full: Program) -> dict[str, str]:
    """The full model's name for each parameter of a cut, whose last layer is the last there."""
    names: dict[str, str] = {}
    for own, whole in zip(cut.calls, full.calls, strict=True):
        for index in own.numbers:
            is_last = index and index == own.numbers[-1]
            there = whole.numbers[-1] if is_last else index
            own_names = of_layer(own.parameters, index)
            names |= dict(zip(own_names, of_layer(whole.parameters, there), strict=True))
    return names
