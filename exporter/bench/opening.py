"""How a process of its own opens an arm of `bench`, from imports to a forward.

What an arm does not need is not imported at the top: importing is part of its cold start.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanexport.exporter.bench.arms import ARMS, Job, kernel_of, options_of
from wanexport.exporter.bench.expert import with_measured_expert
from wanexport.runtime.bundle.manifest import Manifest, read_manifest
from wanexport.runtime.bundle.tensorfile import load_arrays
from wanexport.runtime.engines.choose import choose_engine
from wanexport.runtime.engines.table import ENGINES
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.load import open_engine

if TYPE_CHECKING:
    from wanexport.exporter.reference.diffusers import DiffusersEngine

Inputs = Mapping[str, Any]
Forward = Callable[[Inputs], Any]
# As Hugging Face publishes for regional AOTInductor on ZeroGPU; its autotuning is for a GPU.
_WEIGHTLESS = {
    "aot_inductor.package_constants_in_so": False,
    # As in our own engines: for a single package, precompiling headers takes longer than it saves.
    "cpp_cache_precompile_headers": False,
    "aot_inductor.precompile_headers": False,
}
_TUNED = {
    "conv_1x1_as_mm": True,
    "epilogue_fusion": False,
    "coordinate_descent_tuning": True,
    "coordinate_descent_check_all_directions": True,
    "max_autotune": True,
}


def import_libraries(job: Job) -> None:
    """Import what `open_arm` would, so that the time of one is told from that of the other."""
    arm = ARMS[job.arm]
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
    arm, bundle = ARMS[job.arm], Path(job.bundle)
    manifest = with_measured_expert(read_manifest(bundle))
    if arm.backend is not None:
        options = options_of(arm, job)
        choice = choose_engine(bundle, manifest, options)
        session = open_engine(bundle, manifest, choice, options).session()
        return lambda inputs: session(**inputs)
    if arm.peer == "graph":
        from wanexport.exporter.reference.eager import EagerEngine

        graph = EagerEngine(*_peer_arguments(job, manifest), device=job.device)
        return _with_kernel(job, partial(graph, memory=graph.memory()))
    peer = _open_diffusers(job, manifest)
    if arm.compiles == "regional":
        _load_blocks(peer.model, Path(job.package))
    elif arm.compiles:
        peer.model.compile(mode=arm.compiles)
    return _with_kernel(job, peer)


def read_inputs(job: Job) -> dict[str, Any]:
    """Arrays on a CPU, tensors on a GPU; an engine is given its timestep on the host."""
    arrays = load_arrays(Path(job.inputs))
    if not job.on_gpu:
        return arrays
    import torch

    host = {"timestep"} if ARMS[job.arm].backend is not None else set()
    return {n: a if n in host else torch.from_numpy(a).to(job.device) for n, a in arrays.items()}


def compile_block(job: Job) -> dict[str, Any]:
    """Write the first block of diffusers' model as an AOTInductor package without weights."""
    import torch

    engine = _open_diffusers(job, with_measured_expert(read_manifest(Path(job.bundle))))
    block, inputs = engine.model.blocks[0], read_inputs(job)
    arguments = _arguments_of(block, lambda: engine(inputs))
    configs = {**_WEIGHTLESS, **(_TUNED if job.on_gpu else {})}
    started = time.perf_counter()
    with torch.no_grad(), _kernel(job):
        program = torch.export.export(block, arguments)
        torch._inductor.aoti_compile_and_package(
            program, package_path=job.package, inductor_configs=configs
        )
    return {"compile_seconds": time.perf_counter() - started}


class _Captured(Exception):
    """Ends a forward at the module whose arguments it carries."""


def _arguments_of(module: Any, run: Callable[[], Any]) -> tuple[Any, ...]:
    """The arguments that a module is called with; nothing after it runs."""

    def capture(_: object, arguments: tuple[Any, ...]) -> None:
        raise _Captured(*arguments)

    handle = module.register_forward_pre_hook(capture)
    try:
        run()
    except _Captured as captured:
        return captured.args
    finally:
        handle.remove()
    raise AssertionError("the model never called its first block")


def _load_blocks(model: Any, package: Path) -> None:
    """Replace each block by the package, which reads the block's own parameters where they lie."""
    import torch

    for block in model.blocks:
        compiled = torch._inductor.aoti_load_package(str(package))
        compiled.load_constants(block.state_dict(), check_full_update=True, user_managed=True)
        block.forward = compiled


def _open_diffusers(job: Job, manifest: Manifest) -> "DiffusersEngine":
    from wanexport.exporter.reference.diffusers import DiffusersEngine

    return DiffusersEngine(*_peer_arguments(job, manifest), device=job.device)


def _peer_arguments(job: Job, manifest: Manifest) -> tuple[Any, ...]:
    """Config, geometry, dtype and tensors of a peer."""
    from wanexport.graphs.weights import bundle_tensors
    from wanexport.runtime.bundle.signature import parameter_shapes

    config = manifest.config
    names = {name: name for name in parameter_shapes(config)}
    return config, Geometry(**job.geometry), job.dtype, bundle_tensors(Path(job.weights), names)


def _with_kernel(job: Job, forward: Forward) -> Forward:
    """The forward with the arm's attention kernel, which must be chosen at every call."""

    def run(inputs: Inputs) -> Any:
        with _kernel(job):
            return forward(inputs)

    return run


def _kernel(job: Job) -> AbstractContextManager[None]:
    kernel = kernel_of(ARMS[job.arm], job)
    if kernel is None:
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernels = {"cudnn": SDPBackend.CUDNN_ATTENTION, "fa2": SDPBackend.FLASH_ATTENTION}
    return sdpa_kernel(kernels[kernel])
