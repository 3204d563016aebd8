"""The side of the proof that runs in a process of its own.

It opens the real engine, and compares the lowered cut with eager PyTorch.

    python -m wanexport.exporter.proof_process JOB.json        prints the result as JSON
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wanexport.exporter.eager import EagerEngine
from wanexport.exporter.parity import forward_inputs, measure
from wanexport.graphs.config import WanConfig
from wanexport.graphs.weights import bundle_tensors
from wanexport.runtime.errors import WanExportError
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.load import WEIGHTS_FILE
from wanexport.runtime.onnx_engine import OnnxEngine

TIMESTEP = 812.0
SEED = 0


@dataclass(frozen=True)
class Job:
    """What the fresh process is told; all paths are absolute."""

    engine: str
    dtype: str
    runs_here: bool
    weights: str  # folder of the engine's weights
    cut: str
    tensors: dict[str, str]  # names of the cut's parameters -> names in `weights`
    config: dict[str, Any]  # of the cut
    geometry: dict[str, Any]


def prove(job: Job) -> dict[str, Any]:
    """Open the engine and compare its cut.

    fp16 is not opened whole: ONNX Runtime would widen all its weights in memory.
    Raises WanExportError when an output is not finite or the gate fails.
    """
    config, geometry = WanConfig(**job.config), Geometry(**job.geometry)
    method = "checker; cut compared" if job.runs_here else "checker; fp32 twin compared"
    if job.dtype == "fp32":
        OnnxEngine(Path(job.engine), Path(job.weights))
        method = "engine opened; cut compared"
    inputs = forward_inputs(config, geometry, TIMESTEP, SEED)
    tensors = bundle_tensors(Path(job.weights) / WEIGHTS_FILE, job.tensors)

    def eager(dtype: str) -> np.ndarray:
        return EagerEngine(config, geometry, dtype, tensors, resident=False)(inputs)

    # The engine first, and closed after its call: its mapped weights and what eager PyTorch leaves
    # allocated would add up.
    velocity = OnnxEngine(Path(job.cut), Path(job.weights), keep_casts=not job.runs_here)(inputs)
    reference = eager("fp32")
    floor = eager(job.dtype) if job.runs_here and job.dtype != "fp32" else None
    _check_finite(job.dtype, reference, velocity)
    parity = measure(velocity, reference, floor)
    if not parity.passed:
        raise WanExportError(
            f"relative L2 error {parity.error:.2e} is over the gate {parity.gate:.2e}: "
            f"this is a fault of wanexport or of a library, please report it"
        )
    return {
        "method": method,
        "blocks": config.num_layers,
        "tokens": geometry.num_tokens,
        "error": parity.error,
        "floor": parity.floor,
        "gate": parity.gate,
    }


def _check_finite(dtype: str, reference: np.ndarray, velocity: np.ndarray) -> None:
    if not np.isfinite(reference).all():
        raise WanExportError("the model gives NaN or Inf in eager fp32: check the checkpoint")
    if not np.isfinite(velocity).all():
        raise WanExportError(
            f"the {dtype} engine gives NaN or Inf: build with --dtype bf16 or fp32"
        )


def main(path: str) -> None:
    """Entry point of the fresh process."""
    try:
        print(json.dumps(prove(Job(**json.loads(Path(path).read_text())))))
    except WanExportError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(sys.argv[1])
