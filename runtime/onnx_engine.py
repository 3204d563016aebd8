"""A weightless ONNX graph in ONNX Runtime on the CPU, its weights mapped from the bundle's file."""

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from wanexport.runtime.errors import WanExportError


class OnnxEngine:
    """Calls one `denoiser.onnx` with the weights in `weights_folder`; fp32 arrays in and out.

    Prepacking is off so that fp32 weights stay a mapping of the file: no copy, shared by processes.
    fp16 weights ONNX Runtime widens to fp32 in memory, having few fp16 kernels for a CPU.
    `keep_casts` is for a graph that widens its own weights: it does so at every call, in the memory
    of one weight, instead of once for all when the session is created.
    Raises WanExportError when ONNX Runtime is missing or refuses the graph.
    """

    def __init__(self, graph: Path, weights_folder: Path, *, keep_casts: bool = False) -> None:
        onnxruntime = _onnxruntime()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what goes wrong is raised; it need not be printed too
        options.add_session_config_entry("session.disable_prepacking", "1")
        skipped = ["ConstantFolding"] if keep_casts else []
        options.enable_cpu_mem_arena = not keep_casts  # it keeps what the largest weight took
        # From bytes: a path would make ONNX Runtime look for the weights beside the graph.
        try:
            options.add_session_config_entry(
                "session.model_external_initializers_file_folder_path",
                str(weights_folder.resolve()),
            )
            self.session = onnxruntime.InferenceSession(
                graph.read_bytes(),
                options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=skipped,
            )
        except Exception as error:  # ONNX Runtime's own exceptions have no base but this
            raise WanExportError(f"ONNX Runtime cannot load {graph}: {_reason(error)}") from error

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Run the graph and return its one output.

        Raises WanExportError when ONNX Runtime cannot, for want of memory most likely.
        """
        try:
            output: np.ndarray = self.session.run(None, dict(inputs))[0]
        except Exception as error:
            raise WanExportError(f"ONNX Runtime cannot run the engine: {_reason(error)}") from error
        return output


def versions() -> dict[str, str]:
    """What the manifest records about this backend on this machine.

    Raises WanExportError when ONNX Runtime is missing.
    """
    return {
        "device": "cpu",
        "machine": platform.machine(),
        "onnxruntime": _onnxruntime().__version__,
    }


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise WanExportError(
            "ONNX Runtime is not installed: pip install 'wanexport[cpu]'"
        ) from error
    return onnxruntime
