"""The proof that ends every build: a fresh process compares a cut of the graph with eager PyTorch.

The cut is the first and the last layer with the real weights, at a few tokens. It is lowered by
the same call with the same options as the engine, and compared with the engine's own calls node by
node: only integers of the token grid may differ. An engine whose precision this machine cannot
execute is proven by its own graph retyped to fp32, which widens the engine's own weights.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wanexport.exporter.backends.backend import Request
from wanexport.exporter.backends.onnx.assemble import assemble
from wanexport.exporter.backends.onnx.lower import Lowering, lower, serialize
from wanexport.exporter.backends.onnx.proof_process import OnnxJob
from wanexport.exporter.backends.onnx.retype import retype
from wanexport.exporter.backends.onnx.same import compare_graphs
from wanexport.exporter.backends.proof import MAX_TOKENS, cut_for, run_in_fresh_process, worst
from wanexport.exporter.child.child import temporary_folder
from wanexport.exporter.reference.eager import tensors_of_cut
from wanexport.exporter.reference.figures import make_case
from wanexport.runtime.bundle.signature import program_of, weights_layout
from wanexport.runtime.engines.onnx import RUNNABLE_DTYPES


def prove_lowering(
    request: Request,
    how: Lowering,
    graph: Path,
    weights: Sequence[Path],
    verify: str,
    *,
    device: str = "cpu",
    opens: bool = True,
) -> dict[str, Any]:
    """Prove a graph with each expert's weights file, and return the figures of the worst.

    graph is the ONNX file that was lowered so, whose weights are inputs or in files; verify is
    `ends` or `full`: which layers the cut keeps; device runs the cut; opens is whether the graph is
    an engine of ONNX Runtime's. Raises WanExportError when it fails.
    """
    started = time.monotonic()
    config, small = request.config, request.geometry.reduced(MAX_TOKENS)
    cut = cut_for(config, verify)
    lowered = lower(request.graph, cut, small, how)
    tensors = tensors_of_cut(lowered.program, program_of(config, small))
    _, entries = weights_layout(config, how.dtype)
    stored = {name: entries[tensor] for name, tensor in tensors.items()}
    content = serialize(assemble(lowered, stored))
    differing = compare_graphs(graph.read_bytes(), content, (request.geometry, small))
    runs_here = device != "cpu" or how.dtype in RUNNABLE_DTYPES
    if not runs_here:
        content = serialize(assemble(retype(lowered, how.dtype), stored))
    figures = []
    with temporary_folder() as scratch:
        (scratch / "cut.onnx").write_bytes(content)
        case = make_case(cut, small, how.dtype, device=device, tensors=tensors, folder=scratch)
        for file in weights:
            job = OnnxJob(
                **case,
                weights=str(file.resolve()),
                engine=str(graph.resolve()),
                cut=str(scratch / "cut.onnx"),
                runs_here=runs_here,
                opens=opens,
            )
            figures.append(run_in_fresh_process("onnx.proof_process", job, scratch))
    return {**worst(figures, verify, started), "integers_of_the_grid": differing}
