"""A weightless ONNX graph in ONNX Runtime on the CPU, its weights mapped from the bundle's file."""

import os
import platform
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from wanexport.runtime.bundle.pinned_file import PinnedFile, pin
from wanexport.runtime.engines.onnx_location import with_location
from wanexport.runtime.engines.onnx_providers import gpu_obstacle
from wanexport.runtime.errors import WanExportError, first_line, needing_extra


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
