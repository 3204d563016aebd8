"""PyTorch's library of translations to ONNX, read once a process.

`torch.onnx.export` parses the source of all of its functions on every call, which takes longer than
to translate a small model.
"""

from functools import cache
from typing import Any

from torch.onnx._internal.exporter._registration import ONNXRegistry


def read_once() -> None:
    """Give each export a copy of one registry, as it adds its own translations to it."""
    read = cache(ONNXRegistry.from_torchlib)

    def copied(*arguments: Any, **options: Any) -> ONNXRegistry:
        whole, registry = read(*arguments, **options), ONNXRegistry()
        vars(registry).update(vars(whole))
        registry.functions = {target: [*known] for target, known in whole.functions.items()}
        return registry

    ONNXRegistry.from_torchlib = staticmethod(copied)  # type: ignore[method-assign]
