"""The side of a TensorRT plan's proof that runs in a process of its own.

python -m wanexport.exporter.backends.tensorrt.proof_process JOB.json
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanexport.exporter.child.child import main
from wanexport.exporter.reference.figures import Case, proof_figures


@dataclass(frozen=True)
class PlanJob(Case):
    """What the fresh process is told of a TensorRT engine; all paths are absolute."""

    flavour: str
    plan: str
    version_compatible: bool


def prove_plan(job: PlanJob) -> dict[str, Any]:
    """Open the plan and run it as it is, at its own size and with all its weights.

    Raises WanExportError when TensorRT refuses the plan, an output is not finite, or the gate
    fails.
    """
    from wanexport.runtime.engines import tensorrt as tensorrt_engine

    program = job.program()
    velocity = tensorrt_engine.run_once(
        job.flavour,
        Path(job.plan),
        Path(job.weights),
        inputs=program.inputs,
        output=program.output,
        values=job.arrays(),
        device=job.device,
        version_compatible=job.version_compatible,
    )
    return proof_figures(job, "plan opened and run on the GPU", velocity)


if __name__ == "__main__":
    main(sys.argv[1], lambda job: prove_plan(PlanJob(**job)))
