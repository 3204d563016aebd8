"""The side of a TensorRT plan's proof that runs in a process of its own.

python -m wanexport.exporter.backends.tensorrt.proof_process JOB.json
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanexport.exporter.child.child import main
from wanexport.exporter.reference.figures import Case, proof_figures
from wanexport.runtime.program import WHOLE


@dataclass(frozen=True)
class PlanJob(Case):
    """What the fresh process is told of a TensorRT engine; all paths are absolute.

    plans are by the calls of the whole Program.
    """

    flavour: str
    plans: dict[str, str]
    version_compatible: bool


def prove_plan(job: PlanJob) -> dict[str, Any]:
    """Open the plans and run them as they are, at their own size and with all their weights.

    Raises WanExportError when TensorRT refuses the plan, an output is not finite, or the gate
    fails.
    """
    velocity = (_run_once if job.program().is_plain else _run_calls)(job)
    return proof_figures(job, "plan opened and run on the GPU", velocity)


def _run_once(job: PlanJob) -> Any:
    from wanexport.runtime.engines.tensorrt import run_once

    program = job.program()
    return run_once(
        job.flavour,
        Path(job.plans[WHOLE]),
        Path(job.weights),
        inputs=program.inputs,
        output=program.output,
        values=job.arrays(),
        device=job.device,
        version_compatible=job.version_compatible,
    )


def _run_calls(job: PlanJob) -> Any:
    from wanexport.runtime.engines.tensorrt_moments import run_calls

    return run_calls(
        job.flavour,
        {name: Path(path) for name, path in job.plans.items()},
        Path(job.weights),
        job.program().whole(),
        job.dtype,
        job.calls(),
        device=job.device,
        version_compatible=job.version_compatible,
    )


if __name__ == "__main__":
    main(sys.argv[1], lambda job: prove_plan(PlanJob(**job)))
