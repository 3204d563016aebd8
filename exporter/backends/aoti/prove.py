"""The proof of an AOTInductor engine: a fresh process opens its packages and compares them.

On a GPU they run as they are, with the first and the last block's weights. On a CPU, where a video
of full size would take minutes, they are opened, and packages of at most 1000 tokens compared.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from wanexport.exporter.backends.aoti.compile import compile_regions
from wanexport.exporter.backends.aoti.proof_process import RegionsJob
from wanexport.exporter.backends.backend import Request
from wanexport.exporter.backends.proof import MAX_TOKENS, run_in_fresh_process
from wanexport.exporter.child.child import temporary_folder
from wanexport.exporter.reference.eager import cut_to_ends, tensors_of_cut
from wanexport.runtime.bundle.manifest import EngineRecord


def prove_regions(
    request: Request, engine: EngineRecord, bundle: Path, weights: Sequence[Path], verify: str
) -> dict[str, Any]:
    """Prove an engine with each expert's weights file, and return the figures of the worst.

    verify is `ends` or `full`: which blocks run. Raises WanExportError when it fails.
    """
    started = time.monotonic()
    config = request.config
    cut = cut_to_ends(config) if verify == "ends" else config
    files = {role: (bundle / file.path).resolve() for role, file in engine.files.items()}
    figures = []
    with temporary_folder() as scratch:
        geometry, compared, kernels = request.geometry, dict(files), dict(engine.attention)
        if request.device == "cpu" and geometry.num_tokens > MAX_TOKENS:
            geometry = geometry.reduced(MAX_TOKENS)
            compared, _, _ = compile_regions(config, geometry, request.dtype, "cpu", scratch)
            kernels = {}
        for file in weights:
            job = RegionsJob(
                engine=_texts(files),
                compared=_texts(compared),
                parameters=engine.parameters,
                attention=kernels,
                device=request.device,
                dtype=request.dtype,
                weights=str(file.resolve()),
                tensors=tensors_of_cut(cut, config),
                config=asdict(cut),
                geometry=asdict(geometry),
            )
            figures.append(run_in_fresh_process("aoti.proof_process", job, scratch))
    worst = max(figures, key=lambda f: f["error"])
    return {**worst, "verify": verify, "seconds": round(time.monotonic() - started, 2)}


def _texts(files: Mapping[str, Path]) -> dict[str, str]:
    return {role: str(path) for role, path in files.items()}
