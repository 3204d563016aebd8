"""The proof that ends every build, run in a fresh process.

It opens the real engine, and compares a cut of the same graph (first and last block, real weights,
at most `MAX_TOKENS` tokens) with eager PyTorch. An engine that this machine cannot execute is
proven by the ONNX checker and by its fp32 twin: the same cut in fp32, with the weights widened.

    python -m wanexport.exporter.proof JOB.json        prints the result as JSON
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wanexport.exporter.eager import EagerEngine
from wanexport.exporter.parity import forward_inputs, measure
from wanexport.graphs.config import WanConfig
from wanexport.runtime.errors import WanExportError
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.onnx_engine import OnnxEngine

MAX_TOKENS = 1000
TIMESTEP = 812.0
SEED = 0


@dataclass(frozen=True)
class Job:
    """What the fresh process is told; `tensors` maps the cut's names to the file's."""

    engine: str
    engine_runs_here: bool
    cut: str
    dtype: str
    config: dict[str, Any]
    geometry: dict[str, Any]
    weights: dict[str, str]  # expert -> folder
    tensors: dict[str, str]


def run_in_fresh_process(job: Job, folder: Path) -> dict[str, Any]:
    """Run the proof and return its result.

    Raises WanExportError with the child's last words when it fails or dies.
    """
    path = folder / "job.json"
    path.write_text(json.dumps(asdict(job)))
    child = subprocess.run(
        [sys.executable, "-m", "wanexport.exporter.proof", str(path)],
        capture_output=True,
        text=True,
    )
    if child.returncode != 0:
        words = child.stderr.strip().splitlines() or [f"it died with status {child.returncode}"]
        raise WanExportError(f"the built engine failed its proof: {words[-1]}")
    result: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return result


def prove(job: Job) -> dict[str, Any]:
    """Open the engine, compare the cut for every expert, and return the worst figures.

    Raises WanExportError when an output is not finite or the gate fails.
    """
    config, geometry = WanConfig(**job.config), Geometry(**job.geometry)
    inputs = forward_inputs(config, geometry, TIMESTEP, SEED)
    worst: dict[str, Any] = {"error": -1.0}
    for expert, folder in job.weights.items():
        if job.engine_runs_here:
            OnnxEngine(Path(job.engine), Path(folder))
        figures = _compare_cut(job, config, geometry, Path(folder), inputs, expert)
        worst = max(worst, figures, key=lambda f: f["error"])
    return {
        "method": "engine opened; cut compared"
        if job.engine_runs_here
        else "checker; fp32 twin compared",
        "blocks": config.num_layers,
        "tokens": geometry.num_tokens,
        **worst,
    }


def _compare_cut(
    job: Job,
    config: WanConfig,
    geometry: Geometry,
    folder: Path,
    inputs: Mapping[str, np.ndarray],
    expert: str,
) -> dict[str, Any]:
    def eager(dtype: str) -> np.ndarray:
        return EagerEngine(config, geometry, dtype, folder, job.tensors)(inputs)

    reference = eager("fp32")
    floor = eager(job.dtype) if job.engine_runs_here and job.dtype != "fp32" else None
    weights = folder if job.engine_runs_here else Path(job.cut).parent / f"twin-{expert}"
    velocity = OnnxEngine(Path(job.cut), weights)(inputs)
    if not np.isfinite(velocity).all():
        raise WanExportError(
            f"the {job.dtype} engine gives NaN or Inf: build with --dtype bf16 or fp32"
        )
    parity = measure(velocity, reference, floor)
    if not parity.passed:
        raise WanExportError(
            f"relative L2 error {parity.error:.2e} is over the gate {parity.gate:.2e}: "
            f"this is a fault of wanexport or of a library, please report it"
        )
    return {"error": parity.error, "floor": parity.floor, "gate": parity.gate}


def main(path: str) -> None:
    """Entry point of the fresh process."""
    try:
        print(json.dumps(prove(Job(**json.loads(Path(path).read_text())))))
    except WanExportError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(sys.argv[1])
