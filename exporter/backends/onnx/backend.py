"""ONNX engines: what `build` asks of this backend."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from wanexport.exporter.backends.backend import Compiled, Options, Progress, Request
from wanexport.exporter.backends.onnx.assemble import assemble
from wanexport.exporter.backends.onnx.lower import (
    Lowering,
    for_onnx_runtime,
    lower,
    node_counts,
    serialize,
)
from wanexport.exporter.backends.onnx.prove import prove_lowering
from wanexport.graphs.signature import attention_score_bytes
from wanexport.runtime.bundle.details import OnnxDetails
from wanexport.runtime.bundle.durable import write_durably
from wanexport.runtime.bundle.manifest import EngineRecord
from wanexport.runtime.bundle.signature import weights_layout
from wanexport.runtime.engines import onnx as onnx_engine
from wanexport.runtime.engines.device import gpu_or_cpu
from wanexport.runtime.engines.device_name import device_kind
from wanexport.runtime.engines.onnx_providers import gpu_obstacle

ATTENTION = ("native", "mha")
BINDING: tuple[str, ...] = ()  # an ONNX file is bound to no machine
OPTIONS = None
COMPILES = False
SOURCES = (lower.__module__, assemble.__module__)


def default_device() -> str:
    """A GPU where ONNX Runtime can use one: this machine may have it for a CPU only."""
    return "cpu" if gpu_obstacle() else "cuda"


def default_dtype(device: str) -> str:
    """The precision that runs best there."""
    return "fp32" if device == "cpu" else "bf16"


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


def _lowering(request: Request) -> Lowering:
    assert request.attention is not None
    return for_onnx_runtime(request.dtype, request.attention)


def compile_engine(
    folder: Path, request: Request, weights: Mapping[str, Path], progress: Progress
) -> Compiled:
    """Write a graph for each moment in the folder, that of a step as `denoiser.onnx`."""
    progress(f"{request.label}: tracing and lowering", 0, 0)
    how = _lowering(request)
    lowered = lower(request.graph, request.config, request.geometry, how)
    nodes = dict(sorted(node_counts(lowered).items()))
    _, entries = weights_layout(request.config, request.dtype)
    whole = lowered.program.whole()
    files = {call.name: folder / f"{call.name}.onnx" for call in whole.calls}
    for call in whole.calls:
        write_durably(files[call.name], serialize(assemble(lowered, entries, call.when)))
    scores = attention_score_bytes(request.config, lowered.program)
    return Compiled(
        files=files,
        program=whole,
        details=OnnxDetails(attention=how.attention, attention_score_bytes=scores),
        lint=dict(lowered.lint),
        build={"nodes": nodes},
    )


def prove(
    request: Request, engine: EngineRecord, bundle: Path, weights: Sequence[Path], verify: str
) -> dict[str, Any]:
    """The figures of the proof. Raises WanExportError when it fails."""
    graphs = {name: bundle / file.path for name, file in engine.files.items()}
    how = _lowering(request)
    return prove_lowering(request, how, graphs, weights, verify, device=request.device)
