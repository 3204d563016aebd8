"""The proof of a TensorRT engine on the GPU that it is for: a fresh process opens and runs it.

A plan is whole: it runs as it is, with all blocks, at its own size.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from wanexport.exporter.backends.backend import Request
from wanexport.exporter.backends.proof import run_in_fresh_process
from wanexport.exporter.backends.tensorrt.proof_process import PlanJob
from wanexport.runtime.bundle.manifest import EngineRecord
from wanexport.runtime.engines.tensorrt import plan_role
from wanexport.runtime.engines.tensorrt_target import is_version_compatible


def prove_plan(
    request: Request, engine: EngineRecord, bundle: Path, weights: Sequence[Path], verify: str
) -> dict[str, Any]:
    """Prove an engine with each expert's weights file, and return the figures of the worst.

    Whatever verify asks for, all blocks run. Raises WanExportError when it fails.
    """
    started = time.monotonic()
    experts = tuple(request.baked) or ("",) * len(weights)  # in the order of weights
    figures = []
    for expert, file in zip(experts, weights, strict=True):
        plan = (bundle / engine.files[plan_role(engine.files, expert)].path).resolve()
        job = PlanJob(
            flavour=engine.backend,
            plan=str(plan),
            version_compatible=is_version_compatible(engine),
            dtype=request.dtype,
            weights=str(file.resolve()),
            config=asdict(request.config),
            geometry=asdict(request.geometry),
        )
        figures.append(run_in_fresh_process("tensorrt.proof_process", job))
    worst = max(figures, key=lambda f: f["error"])
    return {**worst, "verify": "full", "seconds": round(time.monotonic() - started, 2)}
