"""The proof of an AOTInductor engine: a fresh process opens its packages and compares them.

On a GPU they run as they are, with the first and the last block's weights. On a CPU, where a video
of full size would take minutes, they are opened, and packages of at most 1000 tokens compared: the
programs of both sizes are the same but for integers of the token grid.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wanexport.exporter.backends.aoti.compile import compile_regions
from wanexport.exporter.backends.aoti.proof_process import RegionsJob
from wanexport.exporter.backends.aoti.same import compare_programs
from wanexport.exporter.backends.backend import Request
from wanexport.exporter.backends.proof import MAX_TOKENS, cut_for, run_in_fresh_process, worst
from wanexport.exporter.child.child import temporary_folder
from wanexport.exporter.reference.eager import tensors_of_cut
from wanexport.exporter.reference.figures import make_case
from wanexport.runtime.bundle.manifest import EngineRecord
from wanexport.runtime.bundle.signature import program_of


def prove_regions(
    request: Request, engine: EngineRecord, bundle: Path, weights: Sequence[Path], verify: str
) -> dict[str, Any]:
    """Prove an engine with each expert's weights file, and return the figures of the worst.

    verify is `ends` or `full`: which blocks run. Raises WanExportError when it fails.
    """
    started = time.monotonic()
    config, geometry, dtype = request.config, request.geometry, request.dtype
    cut, device = cut_for(config, verify), request.device
    files = {role: (bundle / file.path).resolve() for role, file in engine.files.items()}
    figures = []
    with temporary_folder() as scratch:
        compared, kernels = files, dict(engine.details.attention)
        differing: dict[str, int] = {}
        if device == "cpu" and geometry.num_tokens > MAX_TOKENS:
            small = geometry.reduced(MAX_TOKENS)
            differing = compare_programs(request.graph, config, dtype, geometry, small)
            geometry = small
            compared = compile_regions(
                request.graph, config, geometry, dtype, device, scratch
            ).files
            kernels = {}
        tensors = tensors_of_cut(program_of(cut, geometry), program_of(config, geometry))
        case = make_case(cut, geometry, dtype, device=device, tensors=tensors, folder=scratch)
        for file in weights:
            job = RegionsJob(
                **case,
                weights=str(file.resolve()),
                engine=_texts(files),
                compared=_texts(compared),
                attention=kernels,
            )
            figures.append(run_in_fresh_process("aoti.proof_process", job, scratch))
    return {**worst(figures, verify, started), "integers_of_the_grid": differing}


def _texts(files: Mapping[str, Path]) -> dict[str, str]:
    return {role: str(path) for role, path in files.items()}
