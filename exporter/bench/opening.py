"""How a process of its own opens an arm of `bench`, from imports to a forward.

What an arm does not need is not imported at the top: importing is part of its cold start.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from wanexport.exporter.bench.arms import Job, options_of, peer_kernel
from wanexport.exporter.bench.expert import with_measured_expert
from wanexport.runtime.bundle.manifest import Manifest, read_manifest
from wanexport.runtime.bundle.tensorfile import load_arrays
from wanexport.runtime.denoiser import Denoiser
from wanexport.runtime.engines.choose import choose_engine
from wanexport.runtime.engines.table import ENGINES
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.load import open_engine
from wanexport.runtime.stream import Stream

Inputs = Mapping[str, Any]
Forward = Callable[[Inputs], Any]


def import_libraries(job: Job) -> None:
    """Import what `open_arm` would, so that the time of one is told from that of the other."""
    arm = job.arm
    if job.on_gpu:  # whose memory is PyTorch's, in every arm
        import torch  # noqa: F401
    if arm.backend is not None:
        ENGINES[arm.backend].backend().import_library(arm.backend)
        return
    import wanexport.exporter.reference.eager

    if arm.peer == "diffusers":
        from diffusers import WanTransformer3DModel  # noqa: F401

        import wanexport.exporter.reference.diffusers  # noqa: F401


def open_arm(job: Job) -> Forward:
    """The arm's forward with the job's weights, on its device.

    Raises WanExportError when its engine cannot be opened.
    """
    if job.arm.backend is None:
        manifest = with_measured_expert(read_manifest(Path(job.bundle)))
        return _with_kernel(job, _open_peer(job, manifest))
    denoiser = open_denoiser(job)
    if denoiser.geometry.chunk:
        return _step_of_first_chunk(denoiser)
    session = denoiser.session()
    return lambda inputs: session(**inputs)


def _step_of_first_chunk(denoiser: Denoiser) -> Forward:
    """A step of a causal engine, which may be repeated: its chunk is never committed."""
    streams: list[Stream] = []

    def run(inputs: Inputs) -> Any:
        own = {n: value for n, value in inputs.items() if denoiser.inputs[n].draw != "place"}
        text = own.pop("text")
        if not streams:
            streams.append(denoiser.stream(text))
        return streams[0].step(**own)

    return run


def open_denoiser(job: Job) -> Denoiser:
    """The engine of an arm that has one. Raises WanExportError when it cannot be opened."""
    bundle, options = Path(job.bundle), options_of(job.arm, job.engine)
    manifest = with_measured_expert(read_manifest(bundle))
    return open_engine(bundle, manifest, choose_engine(bundle, manifest, options), options)


def read_inputs(job: Job) -> dict[str, Any]:
    """Arrays on a CPU, tensors on a GPU; an engine is given its timestep on the host."""
    arrays = load_arrays(Path(job.inputs))
    if not job.on_gpu:
        return arrays
    import torch

    host = set() if job.arm.backend is None else {"timestep"}
    return {n: a if n in host else torch.from_numpy(a).to(job.device) for n, a in arrays.items()}


def _open_peer(job: Job, manifest: Manifest) -> Forward:
    """The forward of our graph or of diffusers' model, eager or compiled."""
    from wanexport.graphs.weights import bundle_tensors
    from wanexport.runtime.bundle.signature import parameter_shapes

    arm, config = job.arm, manifest.config
    names = {name: name for name in parameter_shapes(config)}
    tensors = bundle_tensors(Path(job.weights), names)
    model = (config, Geometry(**job.geometry), job.dtype, tensors)
    if arm.peer == "graph":
        from wanexport.exporter.reference.eager import EagerEngine

        graph = EagerEngine(*model, device=job.device)
        return partial(graph, memory=graph.memory())
    from wanexport.exporter.reference.diffusers import DiffusersEngine

    peer = DiffusersEngine(*model, device=job.device)
    if arm.compiles:
        peer.model.compile(mode=arm.compiles)
    return peer


def _with_kernel(job: Job, forward: Forward) -> Forward:
    """The forward with the peer's attention kernel, which must be chosen at every call."""
    kernel = peer_kernel(job.arm, job.engine)
    if kernel is None:
        return forward
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernels = {"cudnn": SDPBackend.CUDNN_ATTENTION, "fa2": SDPBackend.FLASH_ATTENTION}

    def run(inputs: Inputs) -> Any:
        with sdpa_kernel(kernels[kernel]):
            return forward(inputs)

    return run
