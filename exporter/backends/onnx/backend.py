"""ONNX engines: what `build` asks of this backend."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from wanexport.exporter.backends.backend import Compiled, Options, Progress, Request
from wanexport.exporter.backends.onnx import lower as to_onnx
from wanexport.exporter.backends.onnx import passes, trace
from wanexport.exporter.backends.onnx.prove import prove as prove_onnx
from wanexport.exporter.lint import onnx as onnx_lint
from wanexport.graphs.signature import attention_score_bytes
from wanexport.runtime.bundle.details import OnnxDetails
from wanexport.runtime.bundle.durable import write_durably
from wanexport.runtime.bundle.manifest import EngineRecord
from wanexport.runtime.bundle.signature import weights_layout
from wanexport.runtime.engines import onnx as onnx_engine
from wanexport.runtime.engines.choose import device_kind
from wanexport.runtime.engines.device import gpu_or_cpu
from wanexport.runtime.engines.onnx_providers import gpu_obstacle
from wanexport.runtime.program import WHOLE

ATTENTION = ("native", "mha")
BINDING: tuple[str, ...] = ()  # an ONNX file is bound to no machine
OPTIONS = None
COMPILES = False


def default_device() -> str:
    """A GPU where ONNX Runtime can use one: this machine may have it for a CPU only."""
    return "cpu" if gpu_obstacle() else "cuda"


def default_dtype(device: str) -> str:
    """The precision that runs best there."""
    return "fp32" if device == "cpu" else "bf16"


def code(device: str) -> tuple[ModuleType, ...]:
    """What decides an engine's bytes, beside the graph's own code."""
    return onnx_lint, trace, passes, to_onnx, sys.modules[__name__]


def libraries(request: Request) -> dict[str, str]:
    """Versions of what makes the graph."""
    return {name: version(name) for name in ("torch", "onnx", "onnx-ir", "onnxscript")}


def targets(device: str, options: Options) -> list[dict[str, str]]:
    """What the engine is proven with.

    Raises WanExportError when ONNX Runtime is missing or cannot use the device.
    """
    found = onnx_engine.versions(device)
    gpu_or_cpu(device)
    return [found]


def check_attention(attention: str | None, dtype: str, target: Mapping[str, str]) -> None:
    """Every operator of ATTENTION goes with every precision and device."""


def resolve(request: Request) -> Request:
    """On a GPU ONNX Runtime's own operator is faster by a quarter; elsewhere the standard one."""
    chosen = "native" if device_kind(request.device) == "cpu" else "mha"
    return replace(request, attention=request.attention or chosen)


def compile_engine(
    folder: Path, request: Request, weights: Mapping[str, Path], progress: Progress
) -> Compiled:
    """Write `denoiser.onnx` in the folder."""
    progress(f"{request.label}: tracing and lowering", 0, 0)
    assert request.attention is not None
    path = folder / f"{WHOLE}.onnx"
    _, entries = weights_layout(request.config, request.dtype)
    graph, counts = to_onnx.lower(
        request.config,
        request.geometry,
        request.dtype,
        entries,
        attention=request.attention,
        wide_bias=request.dtype != "fp32",
    )
    write_durably(path, to_onnx.serialize(graph))
    program = request.program
    scores = attention_score_bytes(request.config, program)
    return Compiled(
        files={WHOLE: path},
        program=program.whole(),
        details=OnnxDetails(attention=request.attention, attention_score_bytes=scores),
        lint=counts,
        build={"nodes": dict(sorted(to_onnx.node_counts(graph).items()))},
    )


def prove(
    request: Request, engine: EngineRecord, bundle: Path, weights: Sequence[Path], verify: str
) -> dict[str, Any]:
    """The figures of the proof. Raises WanExportError when it fails."""
    assert request.attention is not None
    return prove_onnx(
        request.config,
        request.geometry,
        request.dtype,
        verify=verify,
        engine=bundle / engine.files[WHOLE].path,
        weights=weights,
        device=request.device,
        attention=request.attention,
    )
