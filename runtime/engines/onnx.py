"""A weightless ONNX graph in ONNX Runtime on the CPU, its weights mapped from the bundle's file."""

import ctypes
import os
import platform
import weakref
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from wanexport.runtime.bundle.pinned_file import PinnedFile, pin
from wanexport.runtime.engines.onnx_location import with_location
from wanexport.runtime.errors import WanExportError, needing_extra

PROVIDERS = {  # our name -> ONNX Runtime's
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}
RTX_PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"


class OnnxEngine:
    """Calls one `denoiser.onnx` with the weights in a file; fp32 arrays in and out.

    Prepacking is off so that fp32 weights stay a mapping of the file: no copy, shared by processes.
    fp16 weights ONNX Runtime widens to fp32 in memory, having few fp16 kernels for a CPU.
    `keep_casts` is for a graph that widens its own weights: it does so at every call, in the memory
    of one weight, instead of once for all when the session is created.
    Raises WanExportError when ONNX Runtime is missing or refuses the graph, and when a file is not
    what was pinned.
    """

    def __init__(
        self, graph: Path | PinnedFile, weights: Path | PinnedFile, *, keep_casts: bool = False
    ) -> None:
        graph, self._weights = pin(graph), pin(weights)
        onnxruntime = import_onnxruntime()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what goes wrong is raised; it need not be printed too
        options.add_session_config_entry("session.disable_prepacking", "1")
        skipped = ["ConstantFolding"] if keep_casts else []
        options.enable_cpu_mem_arena = not keep_casts  # it keeps what the largest weight took
        content = graph.read()
        with self._weights.opened() as descriptor:
            try:
                self.session = onnxruntime.InferenceSession(
                    reading_weights(content, self._weights, options),
                    options,
                    providers=["CPUExecutionProvider"],
                    disabled_optimizers=skipped,
                )
            except Exception as error:  # ONNX Runtime's own exceptions have no base but this
                raise WanExportError(
                    f"ONNX Runtime cannot load {graph.path}: {first_line(error)}"
                ) from error
            # Of what is mapped, whatever file has its name by then.
            self._mapped = os.dup(descriptor)
        weakref.finalize(self, os.close, self._mapped)

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Run the graph and return its one output.

        Raises WanExportError when ONNX Runtime cannot, for want of memory most likely, and when the
        weights were written to since they were opened.
        """
        self._weights.check(self._mapped)
        try:
            output: np.ndarray = self.session.run(None, dict(inputs))[0]
        except Exception as error:
            raise WanExportError(
                f"ONNX Runtime cannot run the engine: {first_line(error)}"
            ) from error
        return output


def reading_weights(graph: bytes, weights: PinnedFile, options: Any) -> bytes:
    """The graph for a session with these options, which reads its weights from this very file.

    Graph and options name the real file: ONNX Runtime refuses one that a link leads out of the
    folder. From a path, in place of bytes, it would look for the weights beside the graph.
    Raises ValueError when the bytes are no graph, or its weights lie in several files.
    """
    real = weights.path.resolve()
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(real.parent)
    )
    return with_location(graph, real.name)


def versions(device: str = "cpu") -> dict[str, str]:
    """What the manifest records about this backend on this machine.

    Raises WanExportError when ONNX Runtime is missing or cannot use the device.
    """
    version = import_onnxruntime().__version__
    if device == "cuda" and (reason := gpu_obstacle()):
        raise WanExportError(reason)
    return {"device": device, "machine": platform.machine(), "onnxruntime": version}


def gpu_obstacle(provider: str = "cuda") -> str:
    """Why ONNX Runtime's provider cannot be had here, in a line; empty when it can.

    ONNX Runtime is not imported, and PyTorch only where the provider is there.
    """
    if reason := _missing(provider):
        return reason
    if find_spec("torch") is None:
        return "ONNX engines on a GPU need PyTorch for its memory: pip install torch"
    import torch

    if not torch.cuda.is_available():
        return "there is no CUDA device here: choose --device cpu"
    return ""


def _missing(provider: str) -> str:
    """What must be installed for a provider; empty when all is there."""
    if provider == "tensorrt-rtx":
        if find_spec(RTX_PLUGIN) and find_spec("onnxruntime"):
            return ""
        return (
            "ONNX Runtime's provider for TensorRT for RTX is not installed: "
            "pip install onnxruntime-ep-nv-tensorrt-rtx-cu13"
        )
    if not _has_library(provider):
        return (
            f"this ONNX Runtime has no {PROVIDERS[provider]}: pip uninstall onnxruntime, then "
            f"pip install onnxruntime-gpu (the two must not be installed together)"
        )
    if provider == "tensorrt" and not (find_spec("tensorrt") or _opens("libnvinfer.so.10")):
        return (
            "ONNX Runtime's provider for TensorRT needs TensorRT 10: "
            "pip install 'tensorrt-cu13>=10.14,<11'"
        )
    return ""


def _has_library(provider: str) -> bool:
    """Whether the installed ONNX Runtime carries a provider's shared library."""
    spec = find_spec("onnxruntime")
    if spec is None or spec.origin is None:
        return False
    name = f"libonnxruntime_providers_{provider}.so"
    return (Path(spec.origin).parent / "capi" / name).is_file()


def _opens(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def first_line(error: BaseException) -> str:
    """What an exception of ONNX Runtime says, without its details."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def import_onnxruntime() -> Any:
    """The module. Raises WanExportError when it is not installed, or does not import."""
    disable_telemetry()
    with needing_extra("cpu", "an ONNX engine"):
        import onnxruntime
    return onnxruntime


def disable_telemetry() -> None:
    """Have ONNX Runtime call nobody, here and in child processes, unless the user has decided.

    From 1.29 on its import writes a device id below the home folder and looks a collector up.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
