"""The side of an ONNX engine's proof that runs in a process of its own.

It opens the real engine, and compares it, or a lowered cut of it, with eager PyTorch.

    python -m wanexport.exporter.backends.onnx.proof_process JOB.json
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wanexport.exporter.child.child import main
from wanexport.exporter.reference.figures import Case, proof_figures
from wanexport.runtime.engines.engine import new_memory
from wanexport.runtime.engines.onnx import OnnxSession

if TYPE_CHECKING:
    import torch

    from wanexport.runtime.engines.onnx_providers import Provider


@dataclass(frozen=True)
class OnnxJob(Case):
    """What the fresh process is told of an ONNX engine; all paths are absolute."""

    engine: str
    cut: str
    runs_here: bool
    opens: bool  # whether ONNX Runtime runs the engine itself


def prove_onnx(job: OnnxJob) -> dict[str, Any]:
    """Open the engine and compare its cut.

    On a CPU fp16 is not opened whole: ONNX Runtime would widen all its weights in memory.
    Raises WanExportError when an output is not finite or the gate fails.
    """
    # The engine first, and closed after its call: its weights and what eager PyTorch leaves
    # allocated would add up.
    velocity, method = (_run_on_cpu if job.device == "cpu" else _run_on_gpu)(job)
    return proof_figures(job, method, velocity, has_floor=job.runs_here)


def _run_on_cpu(job: OnnxJob) -> tuple[np.ndarray, str]:
    """The velocity of the cut, and what was done."""
    method = "checker; cut compared" if job.runs_here else "checker; cut retyped to fp32, compared"
    if job.opens and job.dtype == "fp32":
        OnnxSession(Path(job.engine), Path(job.weights))
        method = "engine opened; cut compared"
    session = OnnxSession(Path(job.cut), Path(job.weights), keep_casts=not job.runs_here)
    state = new_memory(job.program(), lambda shape: np.zeros(shape, np.float32)).state
    return session({**job.arrays(), **state})[0], method


def _run_on_gpu(job: OnnxJob) -> tuple[np.ndarray, str]:
    """The velocity of the cut, and what was done."""
    from wanexport.runtime.engines.device import gpu_or_cpu
    from wanexport.runtime.engines.onnx_providers import Provider

    velocity = run_with_device_weights(job, gpu_or_cpu(job.device), Provider())
    return velocity, "engine opened; cut compared on the GPU"


def run_with_device_weights(
    job: OnnxJob, device: "torch.device", provider: "Provider"
) -> np.ndarray:
    """Open the engine, and return the velocity of its cut on the same tensors of a device."""
    import torch

    from wanexport.runtime.engines.device import to_device
    from wanexport.runtime.engines.device_weights import device_weights
    from wanexport.runtime.engines.onnx_gpu import OnnxGpuSession

    file = Path(job.weights)
    weights = device_weights(file, device)
    OnnxGpuSession(Path(job.engine), file, weights.tensors, device, provider)
    tensors = {name: weights.tensors[stored] for name, stored in job.tensors.items()}
    session = OnnxGpuSession(Path(job.cut), file, tensors, device, provider)
    given = {name: to_device(value, device) for name, value in job.arrays().items()}
    memory = new_memory(job.program(), lambda shape: torch.zeros(shape, device=device))
    velocity, *_ = session({**given, **memory.state})
    return velocity.cpu().numpy()


if __name__ == "__main__":
    main(sys.argv[1], lambda job: prove_onnx(OnnxJob(**job)))
