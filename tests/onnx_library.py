"""PyTorch's library of translations to ONNX, and its list of operators, read once a process.

`torch.onnx.export` parses the source of all of its functions on every call, which takes longer than
to translate a small model. It asks for each operator that PyTorch has once for each namespace.
"""

from functools import cache
from typing import Any

import torch
from torch._export import utils
from torch.onnx._internal.exporter._registration import ONNXRegistry


def read_once() -> None:
    """Give each export a copy of one registry, as it adds its own translations to it."""
    read, materialize = cache(ONNXRegistry.from_torchlib), utils._materialize_cpp_cia_ops
    listed: list[str] = []

    def copied(*arguments: Any, **options: Any) -> ONNXRegistry:
        whole, registry = read(*arguments, **options), ONNXRegistry()
        vars(registry).update(vars(whole))
        registry.functions = {target: [*known] for target, known in whole.functions.items()}
        return registry

    ONNXRegistry.from_torchlib = staticmethod(copied)  # type: ignore[method-assign]

    def materialize_new() -> None:
        """What it asks the dispatcher for, where the dispatcher knows more than it did."""
        names = torch._C._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd")
        if names != listed:
            materialize()
            listed[:] = names

    utils._materialize_cpp_cia_ops = materialize_new
