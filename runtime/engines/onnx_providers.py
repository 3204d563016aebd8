"""ONNX Runtime's execution providers: which can be had here, and their options."""

import ctypes
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from wanexport.runtime.bundle.pinned_file import PinnedFile, pin
from wanexport.runtime.bundle.tensorfile import read_header
from wanexport.runtime.errors import (
    BadRequest,
    WanExportError,
    WanExportWarning,
    explain,
    installing,
    needing_package,
)

if TYPE_CHECKING:
    import torch

PROVIDERS = {  # our name -> ONNX Runtime's
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}
RTX_PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"


def gpu_obstacle(provider: str = "cuda") -> str:
    """Why ONNX Runtime's provider cannot be had here, in a line; empty when it can.

    ONNX Runtime is not imported, and PyTorch only where the provider is there.
    """
    if reason := _missing(provider):
        return reason
    try:
        with needing_package("torch", "an ONNX engine on a GPU"):
            import torch
    except WanExportError as error:
        return str(error)
    if not torch.cuda.is_available():
        return "there is no CUDA device here: choose --device cpu"
    return ""


def _missing(provider: str) -> str:
    """What must be installed for a provider; empty when all is there."""
    if provider == "tensorrt-rtx":
        if find_spec(RTX_PLUGIN) and find_spec("onnxruntime"):
            return ""
        return "ONNX Runtime's provider for TensorRT for RTX is not installed: " + installing(
            "onnxruntime-ep-nv-tensorrt-rtx-cu13"
        )
    if not _has_library(provider):
        return (
            f"this ONNX Runtime has no {PROVIDERS[provider]}: pip uninstall onnxruntime, then "
            f"{installing('onnxruntime-gpu')} (the two must not be installed together)"
        )
    if provider == "tensorrt" and not (find_spec("tensorrt") or _opens("libnvinfer.so.10")):
        return "ONNX Runtime's provider for TensorRT needs TensorRT 10: " + installing(
            "tensorrt-cu13>=10.14,<11"
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


# They decide which memory a call uses, and when: the engine's own.
_RESERVED = ("device_id", "user_compute_stream", "has_user_compute_stream")
_TRT_DTYPES = {"BF16": "trt_bf16_enable", "F16": "trt_fp16_enable"}
_CUDA_GRAPH = ("enable_cuda_graph", "trt_cuda_graph_enable")  # would replay the first call's memory


@dataclass(frozen=True)
class Provider:
    """What executes the graph: a name of `PROVIDERS`, and its options as ONNX Runtime has them.

    cache is the folder for what TensorRT's providers compile.
    Raises BadRequest for an unknown provider, or an option that is the engine's own.
    """

    name: str = "cuda"
    options: Mapping[str, str] = field(default_factory=dict)
    cache: Path | None = None

    def __post_init__(self) -> None:
        if self.name not in PROVIDERS:
            raise BadRequest(
                f"unknown provider {self.name!r}: expected one of {', '.join(PROVIDERS)}"
            )
        for name in self.options:
            if name in _RESERVED + _CUDA_GRAPH:
                raise BadRequest(f"provider option {name} is set by the engine: leave it out")

    @property
    def compiles(self) -> bool:
        """Whether it makes an engine with the weights inside."""
        return self.name.startswith("tensorrt")

    def settings(
        self, device: "torch.device", stream: int, weights: Path | PinnedFile
    ) -> dict[str, str]:
        """All options, on the stream with this handle; `weights` is the file compiled in."""
        if self.name == "cpu":
            return dict(self.options)
        weights = pin(weights)
        own = {
            "device_id": str(device.index),
            "has_user_compute_stream": "1",
            "user_compute_stream": str(stream),
        }
        if self.name == "cuda":
            # TF32 would miss the gate of fp32; the other halves what the arena grows by.
            own |= {"use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}
        if self.compiles and self.cache is not None:
            own |= self._caches(self.cache / f"onnx-{self.name}-{_identity(weights)}")
        if self.name == "tensorrt":  # without, it would compute in fp32
            stored = {entry.dtype for entry in read_header(weights.path).values()}
            own |= {option: "1" for dtype, option in _TRT_DTYPES.items() if dtype in stored}
        return {**own, **self.options}

    def _caches(self, folder: Path) -> dict[str, str]:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:  # without it, the engine serves all the same
            warnings.warn(
                f"the next load compiles anew: cannot write {explain(error)}",
                WanExportWarning,
                stacklevel=2,
            )
            return {}
        if self.name == "tensorrt-rtx":
            return {"nv_runtime_cache_path": str(folder)}
        return {
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": str(folder),
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": str(folder),
        }


def _identity(weights: PinnedFile) -> str:
    """Which content a weights file has: TensorRT's cache tells graphs apart, not their weights."""
    text = f"{weights.path.resolve()} {weights.identity.size} {weights.identity.modified}"
    return sha256(text.encode()).hexdigest()[:16]
