"""The proof that ends every build: lower a cut of the graph, and have a fresh process compare it.

The cut is the first and the last block with the real weights, at a few tokens; a model that has no
more blocks and tokens than that is compared itself. An engine that this machine cannot execute is
proven through its fp32 twin: the same cut in fp32, which widens the engine's own weights.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from wanexport.exporter.backends.onnx import lower as to_onnx
from wanexport.exporter.backends.onnx.proof_process import OnnxJob
from wanexport.exporter.backends.proof import MAX_TOKENS, run_in_fresh_process
from wanexport.exporter.child.child import temporary_folder
from wanexport.exporter.reference.eager import cut_to_ends, tensors_of_cut
from wanexport.runtime.bundle.signature import weights_layout
from wanexport.runtime.engines.choose import RUNNABLE_DTYPES
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
    attention: str = "native",
    wide_bias: bool = True,
) -> dict[str, Any]:
    """Prove an engine with each expert's weights file, and return the figures of the worst.

    verify is `ends` or `full`: which blocks the cut keeps. device runs the engine, which was
    lowered with this attention, and in bf16 or fp16 with this wide_bias. Raises WanExportError when
    it fails.
    """
    started = time.monotonic()
    cut = cut_to_ends(config) if verify == "ends" else config
    small = geometry.reduced(MAX_TOKENS)
    tensors = tensors_of_cut(cut, config)
    _, entries = weights_layout(config, dtype)
    runs_here = device == "cuda" or dtype in RUNNABLE_DTYPES
    layout = {name: entries[tensor] for name, tensor in tensors.items()}
    figures = []
    with temporary_folder() as scratch:
        graph = engine.resolve()
        if not runs_here or (cut, small) != (config, geometry):
            own = dtype if runs_here else "fp32"
            lowered, _ = to_onnx.lower(
                cut, small, own, layout, attention=attention, wide_bias=wide_bias and own != "fp32"
            )
            graph = scratch / "cut.onnx"
            graph.write_bytes(to_onnx.serialize(lowered))
        for file in weights:
            job = OnnxJob(
                engine=str(engine.resolve()),
                device=device,
                dtype=dtype,
                runs_here=runs_here,
                weights=str(file.resolve()),
                cut=str(graph),
                tensors=tensors,
                config=asdict(cut),
                geometry=asdict(small),
            )
            figures.append(run_in_fresh_process("onnx.proof_process", job, scratch))
    worst = max(figures, key=lambda f: f["error"])
    return {**worst, "verify": verify, "seconds": round(time.monotonic() - started, 2)}
