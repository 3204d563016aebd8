"""The backends by name."""

from wanexport.exporter.backends.aoti import backend as aoti_backend
from wanexport.exporter.backends.backend import Backend
from wanexport.exporter.backends.onnx import backend as onnx_backend
from wanexport.exporter.backends.tensorrt.backend import TensorRtBackend

BACKENDS: dict[str, Backend] = {
    "onnx": onnx_backend,
    "aoti": aoti_backend,
    "tensorrt": TensorRtBackend("tensorrt"),
    "tensorrt-rtx": TensorRtBackend("tensorrt-rtx"),
}
