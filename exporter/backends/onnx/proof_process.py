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
from wanexport.runtime.bundle.pinned_file import pin
from wanexport.runtime.engines.engine import Memory
from wanexport.runtime.engines.moments import call_moment
from wanexport.runtime.engines.onnx import OnnxSession
from wanexport.runtime.engines.onnx_moments import numpy_dtype, zeros_by_name

if TYPE_CHECKING:
    import torch

    from wanexport.runtime.engines.onnx_providers import Provider


@dataclass(frozen=True)
class OnnxJob(Case):
    """What the fresh process is told of an ONNX engine; paths are absolute.

    engine and cut are graphs by the calls of the whole Program.
    """

    engine: dict[str, str]
    cut: dict[str, str]
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
    weights = Path(job.weights)
    if job.opens and job.dtype == "fp32":
        for path in job.engine.values():
            OnnxSession(Path(path), weights)
        method = "engine opened; cut compared"
    sessions = {
        name: OnnxSession(Path(path), weights, keep_casts=not job.runs_here)
        for name, path in job.cut.items()
    }
    program = job.program().whole()
    state = zeros_by_name(program, sessions.values())
    memory = Memory({name: np.zeros(s, numpy_dtype(dtype)) for name, (s, dtype) in state.items()})
    velocity: Any = None
    for moment, inputs in job.calls():
        velocity = call_moment(program, sessions, inputs, None, memory, moment)
    return velocity, method


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
    from wanexport.graphs.graph import torch_dtype
    from wanexport.runtime.engines.device import to_device
    from wanexport.runtime.engines.device_weights import device_weights
    from wanexport.runtime.engines.onnx_gpu import OnnxGpuEngine, OnnxGpuSession

    file = pin(Path(job.weights))
    weights = device_weights(file, device)
    for path in job.engine.values():
        OnnxGpuSession(Path(path), file, weights.tensors, device, provider)
    tensors = {name: weights.tensors[stored] for name, stored in job.tensors.items()}
    sessions = {
        name: OnnxGpuSession(Path(path), file, tensors, device, provider)
        for name, path in job.cut.items()
    }
    program = job.program()
    engine = OnnxGpuEngine(sessions, weights, file, program.whole())
    memory, velocity = engine.memory(), None
    for moment, inputs in job.calls():
        given = {
            name: to_device(value, device, torch_dtype(program.inputs[name].dtype))
            for name, value in inputs.items()
        }
        velocity = engine(given, memory=memory, moment=moment)
    assert velocity is not None
    result: np.ndarray = velocity.cpu().numpy()
    return result


if __name__ == "__main__":
    main(sys.argv[1], lambda job: prove_onnx(OnnxJob(**job)))
