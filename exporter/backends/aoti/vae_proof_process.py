"""The side of a VAE engine's proof that runs in a process of its own.

It opens the packages, and decodes and encodes a seeded clip of a first frame and a chunk with them,
or with others of a smaller picture, and with eager PyTorch in fp32.

    python -m wanexport.exporter.backends.aoti.vae_proof_process JOB.json
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wanexport.exporter.child.child import main
from wanexport.exporter.reference.parity import Parity, measure
from wanexport.graphs.graph import empty_graph, torch_dtype
from wanexport.graphs.source_tensor import SourceTensor
from wanexport.graphs.weights import bundle_tensors, read_tensor
from wanexport.runtime.engines.device import gpu_or_cpu, on_device, zero_state
from wanexport.runtime.engines.operators import open_kernel
from wanexport.runtime.engines.vae_clip import Clip
from wanexport.runtime.engines.vae_regions import VaeRegions
from wanexport.runtime.errors import WanExportError
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.program import Call
from wanexport.runtime.vae_config import VaeConfig
from wanexport.runtime.wan_vae import GRAPH, PARTS, parameter_shapes

SEED = 0
_RESULTS = {"decode": "pixels", "encode": "mean"}


@dataclass(frozen=True)
class VaeJob:
    """What the fresh process is told of a VAE engine; all paths are absolute."""

    config: dict[str, Any]
    geometry: dict[str, Any]  # of what is compared
    dtype: str
    device: str
    weights: str
    engine: dict[str, str]  # packages by call, as built
    compared: dict[str, str]  # and those that run
    attention: dict[str, str]  # kernels by kind

    @property
    def sizes(self) -> VaeConfig:
        """The VAE's sizes."""
        return VaeConfig(**self.config)

    @property
    def size(self) -> Geometry:
        """The size of what is compared."""
        return Geometry(**self.geometry)


def prove(job: VaeJob) -> dict[str, Any]:
    """Run the packages with the bundle's weights, on the device they are for.

    Raises WanExportError when a package cannot be opened, an output is not finite, or the gate
    fails.
    """
    device = gpu_or_cpu(job.device)
    names = {name: name for name in parameter_shapes(job.sizes)}
    sources = bundle_tensors(Path(job.weights), names)
    method = "engine opened and run"
    if job.engine != job.compared:
        for part in PARTS:
            _open(job, job.engine, part, device)
        method = f"engine opened; compiled anew for {job.size.name} and run"
    parities = {}
    peaks = {}
    for part in PARTS:
        found, peaks[part] = _of_engine(job, part, sources, device)
        parities[part] = _compare(job, part, found, sources)
    worst = max(parities.values(), key=lambda parity: parity.over_gate)
    return {
        "method": method,
        "blocks": len(job.engine),
        "tokens": job.size.num_tokens,
        "error": worst.error,
        "floor": worst.floor,
        "gate": worst.gate,
        **{f"{part}_error": parity.error for part, parity in parities.items()},
        **{f"{part}_peak_bytes": peak for part, peak in peaks.items() if peak},
    }


def _of_engine(
    job: VaeJob, part: str, sources: Mapping[str, SourceTensor], device: torch.device
) -> tuple[np.ndarray, int]:
    """What the packages give, and the peak of a GPU's memory that they took beside the weights."""
    regions = _open(job, job.compared, part, device)
    tensors = {name: read_tensor(source).to(device) for name, source in sources.items()}
    given = _clip(job, part).to(device)
    before = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    with on_device(device):
        found = _through(regions.bind(tensors).clip(), part, given)
    peak = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else 0
    return found, peak


def _compare(
    job: VaeJob, part: str, found: np.ndarray, sources: Mapping[str, SourceTensor]
) -> Parity:
    """The engine's error, and that of eager PyTorch where it rounds as the engine does."""
    exact = replace(job.sizes, decode_chunk=1, encode_chunk=1, tf32=False)
    reference = _eager(job, exact, "fp32", part, sources)
    dtype = job.dtype if part == "decode" else "fp32"
    floor = None
    if dtype != "fp32" or (job.sizes.tf32 and job.device != "cpu"):
        rounded = replace(exact, tf32=job.sizes.tf32)
        floor = _eager(job, rounded, dtype, part, sources)
    if not np.isfinite(reference).all():
        raise WanExportError("the VAE gives NaN or Inf in eager fp32: check the checkpoint")
    parity = measure(found, reference, floor)
    if not parity.passed:
        raise WanExportError(
            f"relative L2 error {parity.error:.2e} to {part} is over the gate {parity.gate:.2e}: "
            f"this is a fault of wanexport or of a library, please report it"
        )
    return parity


def _clip(job: VaeJob, part: str) -> Tensor:
    """A first latent frame and a chunk, or the video for them, of the picture that is compared."""
    sizes, geometry = job.sizes, job.size
    generator = torch.Generator().manual_seed(SEED)
    if part == "decode":
        _, height, width = geometry.latent
        shape = (1 + sizes.decode_chunk, height, width, sizes.channels)
        return torch.randn(shape, generator=generator)
    shape = (1 + 4 * sizes.encode_chunk, geometry.height, geometry.width, 3)
    return 2 * torch.rand(shape, generator=generator) - 1


def _through(clip: Clip, part: str, given: Tensor) -> np.ndarray:
    results = [written[_RESULTS[part]] for written in (*clip.feed(given), *clip.finish())]
    found: np.ndarray = torch.cat(results).cpu().numpy()
    return found


def _eager(
    job: VaeJob, sizes: VaeConfig, dtype: str, part: str, sources: Mapping[str, SourceTensor]
) -> np.ndarray:
    graph = empty_graph(GRAPH, sizes, job.size, torch_dtype(dtype), device=job.device)
    state = zero_state(graph.program, graph.dtype, torch.device(job.device))
    own = {
        name: read_tensor(source).to(job.device).to(graph.dtype_of(name, graph.dtype))
        for name, source in sources.items()
    }
    graph.load_state_dict(own, assign=True)

    def run(call: Call, frames: Tensor) -> Mapping[str, Tensor]:
        with torch.no_grad():
            return graph.run_call(call, 0, {call.reads[0]: frames}, state)

    given = _clip(job, part).to(job.device)
    return _through(Clip(graph.program, sizes, part, run), part, given)


def _open(job: VaeJob, files: Mapping[str, str], part: str, device: torch.device) -> VaeRegions:
    kernels = {kind: open_kernel(name, None) for kind, name in job.attention.items()}
    paths = {role: Path(path) for role, path in files.items()}
    return VaeRegions(paths, job.sizes, job.size, job.dtype, part, kernels, device)


if __name__ == "__main__":
    main(sys.argv[1], lambda job: prove(VaeJob(**job)))
