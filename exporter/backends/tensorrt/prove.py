"""The proof of a TensorRT engine on the GPU that it is for: a fresh process opens and runs it.

A plan is whole: it runs as it is, with all blocks, at its own size.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wanexport.exporter.backends.backend import Request
from wanexport.exporter.backends.proof import run_in_fresh_process, worst
from wanexport.exporter.backends.tensorrt.proof_process import PlanJob
from wanexport.exporter.child.child import temporary_folder
from wanexport.exporter.reference.figures import make_case
from wanexport.runtime.bundle.manifest import EngineRecord
from wanexport.runtime.bundle.signature import parameter_shapes
from wanexport.runtime.engines.tensorrt import plan_role
from wanexport.runtime.program import WHOLE


def prove_plan(
    request: Request, engine: EngineRecord, bundle: Path, weights: Sequence[Path], verify: str
) -> dict[str, Any]:
    """Prove an engine with each expert's weights file, and return the figures of the worst.

    Whatever verify asks for, all blocks run. Raises WanExportError when it fails.
    """
    started = time.monotonic()
    experts = tuple(request.baked) or ("",) * len(weights)  # in the order of weights
    names = {name: name for name in parameter_shapes(request.config)}
    figures = []
    with temporary_folder() as scratch:
        case = make_case(
            request.config, request.geometry, request.dtype,
            device=request.device, tensors=names, folder=scratch,
        )  # fmt: skip
        for expert, file in zip(experts, weights, strict=True):
            roles = {call.name: call.name for call in engine.program.calls}
            roles[WHOLE] = plan_role(engine.files, expert)
            plans = {name: bundle / engine.files[role].path for name, role in roles.items()}
            job = PlanJob(
                **case,
                weights=str(file.resolve()),
                flavour=engine.backend,
                plans={name: str(path.resolve()) for name, path in plans.items()},
                version_compatible=engine.details.version_compatible,
            )
            figures.append(run_in_fresh_process("tensorrt.proof_process", job, scratch))
    return worst(figures, "full", started)
