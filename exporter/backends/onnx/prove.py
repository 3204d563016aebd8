"""The proof that ends every build: lower a cut of the graph, and have a fresh process compare it.

The cut is the first and the last block with the real weights, at a few tokens; a model that has no
more blocks and tokens than that is compared itself. An engine that this machine cannot execute is
proven through its fp32 twin: the same cut in fp32, which widens the engine's own weights.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wanexport.exporter.backends.onnx import lower as to_onnx
from wanexport.exporter.backends.onnx.proof_process import OnnxJob
from wanexport.exporter.backends.proof import MAX_TOKENS, cut_for, run_in_fresh_process, worst
from wanexport.exporter.child.child import temporary_folder
from wanexport.exporter.reference.eager import tensors_of_cut
from wanexport.exporter.reference.figures import make_case
from wanexport.runtime.bundle.signature import program_of, weights_layout
from wanexport.runtime.engines.onnx import RUNNABLE_DTYPES
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.wan_config import WanConfig


def prove(
    config: WanConfig,
    geometry: Geometry,
    dtype: str,
    *,
    verify: str,
    engine: Path,
    weights: Sequence[Path],
    device: str = "cpu",
    **lowering: Any,
) -> dict[str, Any]:
    """Prove an engine with each expert's weights file, and return the figures of the worst.

    verify is `ends` or `full`: which blocks the cut keeps. device runs the engine. lowering is what
    it was lowered with, as `lower` takes it: attention, and wide_bias of bf16 and fp16.
    Raises WanExportError when it fails.
    """
    started = time.monotonic()
    cut, small = cut_for(config, verify), geometry.reduced(MAX_TOKENS)
    tensors = tensors_of_cut(program_of(cut, small), program_of(config, small))
    runs_here = device != "cpu" or dtype in RUNNABLE_DTYPES
    figures = []
    with temporary_folder() as scratch:
        graph = engine.resolve()
        if not runs_here or (cut, small) != (config, geometry):
            _, entries = weights_layout(config, dtype)
            stored = {name: entries[tensor] for name, tensor in tensors.items()}
            own = dtype if runs_here else "fp32"
            graph = _lowered_cut(scratch, cut, small, own, stored, **lowering)
        case = make_case(cut, small, dtype, device=device, tensors=tensors, folder=scratch)
        for file in weights:
            job = OnnxJob(
                **case,
                weights=str(file.resolve()),
                engine=str(engine.resolve()),
                cut=str(graph),
                runs_here=runs_here,
            )
            figures.append(run_in_fresh_process("onnx.proof_process", job, scratch))
    return worst(figures, verify, started)


def _lowered_cut(
    folder: Path,
    cut: WanConfig,
    geometry: Geometry,
    dtype: str,
    stored: Mapping[str, Any],
    *,
    attention: str = "native",
    wide_bias: bool = True,
) -> Path:
    """Write the graph of a cut, which is lowered as the engine was, but in a dtype of its own."""
    lowered, _ = to_onnx.lower(
        cut, geometry, dtype, stored, attention=attention, wide_bias=wide_bias and dtype != "fp32"
    )
    path = folder / "cut.onnx"
    path.write_bytes(to_onnx.serialize(lowered))
    return path
