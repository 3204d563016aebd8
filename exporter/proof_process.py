"""The side of the proof that runs in a process of its own.

It opens the real engine, and compares it, or a lowered cut of it, with eager PyTorch.

    python -m wanexport.exporter.proof_process JOB.json        prints the result as JSON
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wanexport.exporter.child.child import main
from wanexport.exporter.reference.eager import EagerEngine
from wanexport.exporter.reference.parity import forward_inputs, measure
from wanexport.graphs.weights import bundle_tensors, read_tensor
from wanexport.runtime.bundle.manifest import TensorSpec
from wanexport.runtime.bundle.signature import input_shapes, parameter_shapes
from wanexport.runtime.engines.onnx import OnnxEngine
from wanexport.runtime.errors import WanExportError
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.wan_config import WanConfig

if TYPE_CHECKING:
    import torch

    from wanexport.runtime.engines.onnx_gpu import Provider

TIMESTEP = 812.0
SEED = 0


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


@dataclass(frozen=True)
class RegionsJob:
    """What the fresh process is told of an AOTInductor engine; all paths are absolute."""

    engine: dict[str, str]  # packages by role, as built
    compared: dict[str, str]  # and those that run
    parameters: dict[str, tuple[str, ...]]
    attention: dict[str, str]
    device: str
    dtype: str
    weights: str  # file
    tensors: dict[str, str]  # names of the cut's parameters -> names in `weights`
    config: dict[str, Any]  # of the cut
    geometry: dict[str, Any]  # of `compared`


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
    return _figures(job.dtype, method, config, geometry, velocity, reference, floor)


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

    from wanexport.runtime.engines.onnx_gpu import Provider

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


def prove_regions(job: RegionsJob) -> dict[str, Any]:
    """Open the packages and run them with the weights of the cut, on the device they are for.

    Raises WanExportError when a package cannot be opened, an output is not finite, or the gate
    fails.
    """
    import torch

    from wanexport.runtime.engines.aoti import Regions, to_device
    from wanexport.runtime.engines.operators import open_kernel

    config, geometry = WanConfig(**job.config), Geometry(**job.geometry)
    device = torch.device("cuda", 0) if job.device == "cuda" else torch.device("cpu")
    library = job.compared.get("flash_attention")
    kernels = {
        int(keys): open_kernel(name, Path(library) if library else None)
        for keys, name in job.attention.items()
    }

    def open_regions(files: dict[str, str]) -> Regions:
        paths = {role: Path(path) for role, path in files.items()}
        return Regions(paths, job.parameters, config.num_layers, kernels, device)

    regions = open_regions(job.compared)
    method = "engine opened and run"
    if job.engine != job.compared:
        open_regions(job.engine)
        method = f"engine opened; compiled anew for {geometry.num_tokens} tokens and run"
    inputs = forward_inputs(config, geometry, TIMESTEP, SEED)
    sources = bundle_tensors(Path(job.weights), job.tensors)
    tensors = {name: read_tensor(source).to(device) for name, source in sources.items()}
    given = [to_device(value, device) for value in inputs.values()]
    velocity = regions.bind(tensors)(given).cpu().numpy()

    def eager(dtype: str) -> np.ndarray:
        model = EagerEngine(config, geometry, dtype, sources, resident=False, device=job.device)
        output: np.ndarray = model(inputs)
        return output

    reference = eager("fp32")
    floor = None if job.dtype == "fp32" else eager(job.dtype)
    return _figures(job.dtype, method, config, geometry, velocity, reference, floor)


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
    return _figures(job.dtype, method, config, geometry, velocity, reference, floor)


def _figures(
    dtype: str,
    method: str,
    config: WanConfig,
    geometry: Geometry,
    velocity: np.ndarray,
    reference: np.ndarray,
    floor: np.ndarray | None,
) -> dict[str, Any]:
    """What the manifest says of the proof. Raises WanExportError when it failed."""
    _check_finite(dtype, reference, velocity)
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


def _prove(job: dict[str, Any]) -> dict[str, Any]:
    """Any kind of job: that of an ONNX engine has a cut, and that of TensorRT's a plan."""
    if "plan" in job:
        return prove_plan(PlanJob(**job))
    return prove_onnx(OnnxJob(**job)) if "cut" in job else prove_regions(RegionsJob(**job))


if __name__ == "__main__":
    main(sys.argv[1], _prove)
