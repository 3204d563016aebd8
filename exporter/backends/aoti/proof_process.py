"""The side of an AOTInductor engine's proof that runs in a process of its own.

It opens the packages, and compares them, or others of fewer tokens, with eager PyTorch.

    python -m wanexport.exporter.backends.aoti.proof_process JOB.json
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wanexport.exporter.child.child import main
from wanexport.exporter.reference.figures import Case, proof_figures
from wanexport.graphs.graph import torch_dtype
from wanexport.graphs.weights import bundle_tensors, read_tensor
from wanexport.runtime.engines.aoti_regions import Regions
from wanexport.runtime.engines.device import gpu_or_cpu, on_device, to_device
from wanexport.runtime.engines.operators import open_kernel


@dataclass(frozen=True)
class RegionsJob(Case):
    """What the fresh process is told of an AOTInductor engine; all paths are absolute."""

    engine: dict[str, str]  # packages by role, as built
    compared: dict[str, str]  # and those that run, of the case's size
    attention: dict[str, str]  # kernels by kind


def prove_regions(job: RegionsJob) -> dict[str, Any]:
    """Open the packages and run them with the weights of the cut, on the device they are for.

    Raises WanExportError when a package cannot be opened, an output is not finite, or the gate
    fails.
    """
    device = gpu_or_cpu(job.device)
    regions = _open(job, job.compared, device)
    method = "engine opened and run"
    if job.engine != job.compared:
        _open(job, job.engine, device)
        method = f"engine opened; compiled anew for {job.size.num_tokens} tokens and run"
    sources = bundle_tensors(Path(job.weights), job.tensors)
    tensors = {name: read_tensor(source).to(device) for name, source in sources.items()}
    specs, memory, bound = regions.program.inputs, regions.memory(), regions.bind(tensors)
    velocity = None
    with on_device(device), _measured(device) as taken:
        for moment, inputs in job.calls():
            given = {
                name: to_device(value, device, torch_dtype(specs[name].dtype))
                for name, value in inputs.items()
            }
            velocity = bound(given, memory, moment)
    assert velocity is not None
    return {**proof_figures(job, method, velocity.cpu().numpy()), **taken}


@contextmanager
def _measured(device: torch.device) -> Iterator[dict[str, int]]:
    """Have what the block takes of a GPU beside what is there already."""
    taken: dict[str, int] = {}
    if device.type != "cuda":
        yield taken
        return
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    yield taken
    taken["peak_bytes"] = torch.cuda.max_memory_allocated(device) - before


def _open(job: RegionsJob, files: Mapping[str, str], device: torch.device) -> Regions:
    library = files.get("flash_attention")
    kernels = {
        kind: open_kernel(name, Path(library) if library else None, kind)
        for kind, name in job.attention.items()
    }
    paths = {role: Path(path) for role, path in files.items()}
    return Regions(paths, job.program(), kernels, device, job.dtype)


if __name__ == "__main__":
    main(sys.argv[1], lambda job: prove_regions(RegionsJob(**job)))
