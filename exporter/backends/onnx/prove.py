"""The proof that ends every build: a fresh process compares a cut of the graph with eager PyTorch.

The cut is the first and the last layer with the real weights, at a few tokens. It is lowered by
the same call with the same options as the engine, and compared with the engine's own calls node by
node: only integers of the token grid may differ. An engine whose precision this machine cannot
execute is proven by its own graph retyped to fp32, which widens the engine's own weights.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wanexport.exporter.backends.backend import Request
from wanexport.exporter.backends.onnx.assemble import assemble
from wanexport.exporter.backends.onnx.lower import Lowered, Lowering, lower, serialize
from wanexport.exporter.backends.onnx.proof_process import OnnxJob
from wanexport.exporter.backends.onnx.retype import retype
from wanexport.exporter.backends.onnx.same import compare_graphs
from wanexport.exporter.backends.proof import MAX_TOKENS, cut_for, run_in_fresh_process, worst
from wanexport.exporter.child.child import temporary_folder
from wanexport.exporter.reference.eager import tensors_of_cut
from wanexport.exporter.reference.figures import make_case
from wanexport.runtime.bundle.signature import program_of, weights_layout
from wanexport.runtime.bundle.tensorfile import TensorEntry
from wanexport.runtime.engines.onnx import RUNNABLE_DTYPES
from wanexport.runtime.geometry import Geometry


def prove_lowering(
    request: Request,
    how: Lowering,
    graphs: Mapping[str, Path],
    weights: Sequence[Path],
    verify: str,
    *,
    device: str = "cpu",
    opens: bool = True,
) -> dict[str, Any]:
    """Prove graphs with each expert's weights file, and return the figures of the worst.

    graphs are the ONNX files that were lowered so, by the calls of the whole Program, whose weights
    are inputs or in files; verify is `ends` or `full`: which layers the cut keeps; device runs the
    cut; opens is whether they are an engine of ONNX Runtime's. Raises WanExportError when it fails.
    """
    started = time.monotonic()
    config, small = request.config, request.geometry.reduced(MAX_TOKENS)
    cut = cut_for(config, verify)
    lowered = lower(request.graph, cut, small, how)
    tensors = tensors_of_cut(lowered.program, program_of(config, small))
    _, entries = weights_layout(config, how.dtype)
    stored = {name: entries[tensor] for name, tensor in tensors.items()}
    cuts = _contents(lowered, stored)
    differing = _differing(graphs, cuts, (request.geometry, small))
    runs_here = device != "cpu" or how.dtype in RUNNABLE_DTYPES
    if not runs_here:
        cuts = _contents(retype(lowered, how.dtype), stored)
    figures = []
    with temporary_folder() as scratch:
        files = _written(scratch, cuts)
        case = make_case(cut, small, how.dtype, device=device, tensors=tensors, folder=scratch)
        for file in weights:
            job = OnnxJob(
                **case,
                weights=str(file.resolve()),
                engine={name: str(path.resolve()) for name, path in graphs.items()},
                cut=files,
                runs_here=runs_here,
                opens=opens,
            )
            figures.append(run_in_fresh_process("onnx.proof_process", job, scratch))
    return {**worst(figures, verify, started), "integers_of_the_grid": differing}


def _contents(lowered: Lowered, weights: Mapping[str, TensorEntry]) -> dict[str, bytes]:
    """The graph of each moment, by the calls of the whole Program."""
    return {
        call.name: serialize(assemble(lowered, weights, call.when))
        for call in lowered.program.whole().calls
    }


def _differing(
    graphs: Mapping[str, Path], cuts: Mapping[str, bytes], sizes: tuple[Geometry, Geometry]
) -> dict[str, int]:
    """How many integers differ between the engine's graphs and those of the cut."""
    found: dict[str, int] = {}
    for name, content in cuts.items():
        found |= compare_graphs(graphs[name].read_bytes(), content, sizes)
    return found


def _written(folder: Path, graphs: Mapping[str, bytes]) -> dict[str, str]:
    """The paths of graphs that are written in a folder."""
    paths = {name: folder / f"{name}.onnx" for name in graphs}
    for name, content in graphs.items():
        paths[name].write_bytes(content)
    return {name: str(path) for name, path in paths.items()}
