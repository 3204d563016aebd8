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
from wanexport.exporter.reference.eager import EagerEngine
from wanexport.exporter.reference.inputs import forward_inputs
from wanexport.graphs.weights import bundle_tensors
from wanexport.runtime.engines.onnx import OnnxEngine
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.wan_config import WanConfig

if TYPE_CHECKING:
    import torch

    from wanexport.runtime.engines.onnx_providers import Provider
from wanexport.exporter.reference.figures import SEED, TIMESTEP, proof_figures


@dataclass(frozen=True)
class OnnxJob:
    """What the fresh process is told of an ONNX engine; all paths are absolute."""

    engine: str
    device: str  # `cpu` or `cuda`
    dtype: str
    runs_here: bool
    weights: str  # file
    cut: str
    tensors: dict[str, str]  # names of the cut's parameters -> names in `weights`
    config: dict[str, Any]  # of the cut
    geometry: dict[str, Any]


def prove_onnx(job: OnnxJob) -> dict[str, Any]:
    """Open the engine and compare its cut.

    On a CPU fp16 is not opened whole: ONNX Runtime would widen all its weights in memory.
    Raises WanExportError when an output is not finite or the gate fails.
    """
    config, geometry = WanConfig(**job.config), Geometry(**job.geometry)
    inputs = forward_inputs(config, geometry, TIMESTEP, SEED)
    tensors = bundle_tensors(Path(job.weights), job.tensors)

    def eager(dtype: str) -> np.ndarray:
        model = EagerEngine(config, geometry, dtype, tensors, resident=False, device=job.device)
        output: np.ndarray = model(inputs)
        return output

    # The engine first, and closed after its call: its weights and what eager PyTorch leaves
    # allocated would add up.
    velocity, method = (_run_on_gpu if job.device == "cuda" else _run_on_cpu)(job, inputs)
    reference = eager("fp32")
    floor = eager(job.dtype) if job.runs_here and job.dtype != "fp32" else None
    return proof_figures(job.dtype, method, config, geometry, velocity, reference, floor)


def _run_on_cpu(job: OnnxJob, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, str]:
    """The velocity of the cut, and what was done."""
    method = "checker; cut compared" if job.runs_here else "checker; fp32 twin compared"
    if job.dtype == "fp32":
        OnnxEngine(Path(job.engine), Path(job.weights))
        method = "engine opened; cut compared"
    engine = OnnxEngine(Path(job.cut), Path(job.weights), keep_casts=not job.runs_here)
    return engine(inputs), method


def _run_on_gpu(job: OnnxJob, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, str]:
    """The velocity of the cut, and what was done."""
    import torch

    from wanexport.runtime.engines.onnx_providers import Provider

    velocity = run_with_device_weights(job, inputs, torch.device("cuda", 0), Provider())
    return velocity, "engine opened; cut compared on the GPU"


def run_with_device_weights(
    job: OnnxJob, inputs: dict[str, np.ndarray], device: "torch.device", provider: "Provider"
) -> np.ndarray:
    """Open the engine, and return the velocity of its cut on the same tensors of a device."""
    from wanexport.runtime.engines.aoti import to_device
    from wanexport.runtime.engines.device_weights import device_weights
    from wanexport.runtime.engines.onnx_gpu import OnnxSession

    file = Path(job.weights)
    weights = device_weights(file, device)
    OnnxSession(Path(job.engine), file, weights.tensors, device, provider)
    tensors = {name: weights.tensors[stored] for name, stored in job.tensors.items()}
    session = OnnxSession(Path(job.cut), file, tensors, device, provider)
    velocity = session({name: to_device(value, device) for name, value in inputs.items()})
    return velocity.cpu().numpy()


if __name__ == "__main__":
    main(sys.argv[1], lambda job: prove_onnx(OnnxJob(**job)))
