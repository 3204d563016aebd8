"""The backends by name, and the one that a build takes unless it is told."""

import torch

from wanexport.exporter.backends.aoti import backend as aoti_backend
from wanexport.exporter.backends.backend import Backend
from wanexport.exporter.backends.onnx import backend as onnx_backend
from wanexport.exporter.backends.tensorrt.backend import TensorRtBackend
from wanexport.runtime.engines.device_name import device_kind
from wanexport.runtime.errors import BadRequest

BACKENDS: dict[str, Backend] = {
    "onnx": onnx_backend,
    "aoti": aoti_backend,
    "tensorrt": TensorRtBackend("tensorrt"),
    "tensorrt-rtx": TensorRtBackend("tensorrt-rtx"),
}
_DEFAULTS = {"cuda": "aoti", "cpu": "onnx"}  # by device


def find_backend(name: str) -> Backend:
    """A backend by its name. Raises BadRequest when there is none."""
    if name not in BACKENDS:
        raise BadRequest(f"unknown backend {name!r}: expected of {', '.join(BACKENDS)}")
    return BACKENDS[name]


def default_backend(device: str | None) -> str:
    """The backend for a device; None stands for the best of this machine."""
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
    return _DEFAULTS[device_kind(kind)]
