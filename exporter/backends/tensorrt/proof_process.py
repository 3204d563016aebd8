"""The side of a TensorRT plan's proof that runs in a process of its own.

python -m wanexport.exporter.backends.tensorrt.proof_process JOB.json
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wanexport.exporter.child.child import main
from wanexport.exporter.reference.eager import EagerEngine
from wanexport.exporter.reference.figures import SEED, TIMESTEP, proof_figures
from wanexport.exporter.reference.inputs import forward_inputs
from wanexport.graphs.weights import bundle_tensors
from wanexport.runtime.bundle.manifest import TensorSpec
from wanexport.runtime.bundle.signature import input_shapes, parameter_shapes
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.wan_config import WanConfig


@dataclass(frozen=True)
class PlanJob:
    """What the fresh process is told of a TensorRT engine; all paths are absolute."""

    flavour: str
    plan: str
    version_compatible: bool
    dtype: str
    weights: str  # file
    config: dict[str, Any]
    geometry: dict[str, Any]


def prove_plan(job: PlanJob) -> dict[str, Any]:
    """Open the plan and run it as it is, at its own size and with all its weights.

    Raises WanExportError when TensorRT refuses the plan, an output is not finite, or the gate
    fails.
    """
    from wanexport.runtime.engines import tensorrt as tensorrt_engine

    config, geometry = WanConfig(**job.config), Geometry(**job.geometry)
    file, inputs = Path(job.weights), forward_inputs(config, geometry, TIMESTEP, SEED)
    specs = {name: TensorSpec(shape) for name, shape in input_shapes(config, geometry).items()}
    velocity = tensorrt_engine.run_once(
        job.flavour,
        Path(job.plan),
        file,
        inputs=specs,
        output=specs["latent"],
        values=inputs,
        version_compatible=job.version_compatible,
    )
    sources = bundle_tensors(file, {name: name for name in parameter_shapes(config)})
    device = tensorrt_engine.gpu().type

    def eager(dtype: str) -> np.ndarray:
        model = EagerEngine(config, geometry, dtype, sources, resident=False, device=device)
        output: np.ndarray = model(inputs)
        return output

    reference = eager("fp32")
    floor = None if job.dtype == "fp32" else eager(job.dtype)
    method = "plan opened and run on the GPU"
    return proof_figures(job.dtype, method, config, geometry, velocity, reference, floor)


if __name__ == "__main__":
    main(sys.argv[1], lambda job: prove_plan(PlanJob(**job)))
