"""The side of an AOTInductor engine's proof that runs in a process of its own.

It opens the packages, and compares them, or others of fewer tokens, with eager PyTorch.

    python -m wanexport.exporter.backends.aoti.proof_process JOB.json
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
from wanexport.graphs.weights import bundle_tensors, read_tensor
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.wan_config import WanConfig


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
    return proof_figures(job.dtype, method, config, geometry, velocity, reference, floor)


if __name__ == "__main__":
    main(sys.argv[1], lambda job: prove_regions(RegionsJob(**job)))
