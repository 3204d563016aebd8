"""ONNX engines: what `build` asks of this backend."""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from wanexport.exporter import onnx_lint, to_onnx, trace
from wanexport.exporter.proof import prove as prove_onnx
from wanexport.exporter.request import Compiled, Progress, Request
from wanexport.graphs.signature import attention_score_bytes
from wanexport.graphs.weights import weights_layout
from wanexport.runtime import onnx_engine
from wanexport.runtime.durable import write_durably
from wanexport.runtime.manifest import EngineRecord

BINDING = ()  # an ONNX file is bound to no machine


def code(device: str) -> tuple[ModuleType, ...]:
    """What decides an engine's bytes, beside the graph's own code."""
    return onnx_lint, trace, to_onnx


def libraries(request: Request) -> dict[str, str]:
    """Versions of what makes the graph."""
    return {name: version(name) for name in ("torch", "onnx", "onnx-ir", "onnxscript")}


def target(device: str) -> dict[str, str]:
    """What the engine is proven with. Raises WanExportError when ONNX Runtime is missing."""
    return onnx_engine.versions()


def compile_engine(folder: Path, request: Request, progress: Progress) -> Compiled:
    """Write `denoiser.onnx` in the folder."""
    progress(f"{request.label}: tracing and lowering", 0, 0)
    path = folder / "denoiser.onnx"
    _, entries = weights_layout(request.config, request.dtype)
    graph, counts = to_onnx.lower(request.config, request.geometry, request.dtype, entries)
    write_durably(path, to_onnx.serialize(graph))
    return Compiled(
        files={"denoiser": path},
        lint=counts,
        build={
            "nodes": dict(sorted(to_onnx.node_counts(graph).items())),
            "attention_score_bytes": attention_score_bytes(request.config, request.geometry),
        },
    )


def prove(
    request: Request, engine: EngineRecord, bundle: Path, weights: Sequence[Path], verify: str
) -> dict[str, Any]:
    """The figures of the proof. Raises WanExportError when it fails."""
    return prove_onnx(
        request.config,
        request.geometry,
        request.dtype,
        verify=verify,
        engine=bundle / engine.files["denoiser"].path,
        weights=weights,
    )
