"""The arms of `bench`: what each runs, whether it can, and how a process of its own opens it.

What an arm does not need is not imported at the top: importing is part of its cold start.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from wanexport.runtime.bundle.check import check_weights
from wanexport.runtime.bundle.manifest import EngineRecord, Manifest, read_manifest
from wanexport.runtime.bundle.tensorfile import load_arrays
from wanexport.runtime.engines.choose import BACKENDS, choose_engine
from wanexport.runtime.engines.onnx import import_onnxruntime
from wanexport.runtime.engines.tensorrt_library import FLAVOURS, import_tensorrt
from wanexport.runtime.errors import WanExportError
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.load import open_engine

if TYPE_CHECKING:
    from wanexport.exporter.reference.diffusers import DiffusersEngine

Inputs = Mapping[str, Any]
Forward = Callable[[Inputs], Any]


class Arm(NamedTuple):
    """What an arm runs (a backend's engine or a peer), its attention kernel, how it compiles."""

    runs: str
    attention: str | None = None
    compiles: str | None = None


ARMS = {  # in the order in which they are measured while the budget lasts
    "wanexport": Arm("aoti"),
    "tensorrt": Arm("tensorrt"),
    "tensorrt-rtx": Arm("tensorrt-rtx"),
    "onnx": Arm("onnx"),
    "graph": Arm("graph", "cudnn"),
    "diffusers": Arm("diffusers", "cudnn"),
    "regional-aoti": Arm("diffusers", "cudnn", "regional"),
    "compile": Arm("diffusers", "cudnn", "default"),
    "wanexport-fa4": Arm("aoti", "fa4"),
    "wanexport-cudnn": Arm("aoti", "cudnn"),
    "wanexport-sdpa": Arm("aoti", "sdpa"),
    "diffusers-fa2": Arm("diffusers", "fa2"),
    "max-autotune": Arm("diffusers", "cudnn", "max-autotune-no-cudagraphs"),
}
_ON_CPU = {"wanexport", "onnx", "graph", "diffusers"}  # by default, where compiling takes minutes
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


@dataclass(frozen=True)
class Job:
    """What the fresh process is told; all paths are absolute.

    `spawned` is the wall clock when it was started. With `compile_only` a regional package is
    written to `package` and nothing is timed; without, it is read from there.
    """

    arm: str
    bundle: str
    device: str  # `cpu` or `cuda`
    dtype: str
    geometry: dict[str, int]
    inputs: str  # safetensors file
    velocity: str  # safetensors file to write
    package: str
    rounds: int
    profile: bool
    spawned: float
    compile_only: bool = False
    provider: str | None = None  # of ONNX Runtime, with its options
    provider_options: dict[str, str] = field(default_factory=dict)


def with_measured_expert(manifest: Manifest) -> Manifest:
    """The manifest with one expert's weights alone: the high-noise one where there are two."""
    expert = "high_noise" if manifest.experts else ""
    weights = {name: w for name, w in manifest.weights.items() if w.expert == expert}
    return replace(manifest, weights=weights)


def kernel_of(arm: Arm, device: str, dtype: str) -> str | None:
    """The attention kernel an arm insists on: none on a CPU, and none of a peer in fp32."""
    chooses = device == "cuda" and (arm.runs in BACKENDS or dtype != "fp32")
    return arm.attention if chooses else None


def choose_arms(
    manifest: Manifest,
    record: EngineRecord,
    job: Job,
    against: Sequence[str] | None,
    backend: str | None,
) -> list[str]:
    """The arms asked for, or all that apply. Raises WanExportError for one that cannot run."""
    for name in against or ():
        if name not in ARMS:
            raise WanExportError(f"unknown arm {name!r}: expected some of {', '.join(ARMS)}")
        if reason := _obstacle(name, manifest, job):
            raise WanExportError(f"arm {name} cannot run here: {reason}")
    if against:
        return list(dict.fromkeys(against))
    recorded = record.attention.get(str(record.geometry.num_tokens))
    same = f"wanexport-{recorded}" if record.backend == "aoti" else ""  # as wanexport itself
    return [
        name
        for name, arm in ARMS.items()
        if name != same
        and not _obstacle(name, manifest, job)
        and (job.device == "cuda" or name in _ON_CPU)
        and (arm.runs not in BACKENDS or backend in (None, arm.runs))
    ]


def _obstacle(name: str, manifest: Manifest, job: Job) -> str:
    """Why an arm cannot run here; empty when it can."""
    arm = ARMS[name]
    try:
        engine = engine_of(name, manifest, job)
        if arm.runs == "diffusers":
            from wanexport.exporter.compare.peers import check_implementation

            check_implementation("diffusers")
    except WanExportError as error:
        return str(error)
    selects = engine is not None or arm.attention == "fa2"
    if selects and arm.attention and not kernel_of(arm, job.device, job.dtype):
        return f"there is no choice of attention kernels for {job.dtype} on {job.device}"
    if engine and arm.attention == "fa4" and "flash_attention" not in engine.files:
        return f"engine {engine.name} has no FlashAttention-4 kernel"
    return ""


def engine_of(name: str, manifest: Manifest, job: Job) -> EngineRecord | None:
    """The engine that an arm runs, None of a peer. Raises WanExportError when there is none."""
    runs = ARMS[name].runs
    if runs not in BACKENDS:
        return None
    return choose_engine(Path(job.bundle), manifest, **_engine_options(job, runs))


def _engine_options(job: Job, backend: str) -> dict[str, Any]:
    """The options that choose the job's engine of a backend."""
    geometry = Geometry(**job.geometry)
    return {
        "backend": backend,
        "provider": job.provider if backend == "onnx" else None,
        "device": job.device,
        "resolution": f"{geometry.height}x{geometry.width}",
        "frames": geometry.frames,
        "dtype": job.dtype,
    }


def import_libraries(job: Job) -> None:
    """Import what `open_arm` would, so that the time of one is told from that of the other."""
    runs = ARMS[job.arm].runs
    if job.device == "cuda":  # whose memory is PyTorch's, in every arm
        import torch  # noqa: F401
    if runs == "onnx":
        import_onnxruntime()
    elif runs in FLAVOURS:
        import_tensorrt(runs)
    elif runs == "aoti":
        import wanexport.runtime.engines.aoti
    elif runs == "graph":
        import wanexport.exporter.reference.eager
    else:
        from diffusers import WanTransformer3DModel  # noqa: F401

        import wanexport.exporter.reference.diffusers  # noqa: F401


def open_arm(job: Job) -> Forward:
    """The arm's forward with the bundle's weights, on the job's device.

    Raises WanExportError when its engine cannot be opened.
    """
    arm, bundle = ARMS[job.arm], Path(job.bundle)
    manifest = with_measured_expert(read_manifest(bundle))
    if arm.runs in BACKENDS:
        options = _engine_options(job, arm.runs)
        engine = choose_engine(bundle, manifest, **options)
        attention = kernel_of(arm, job.device, job.dtype)
        denoiser = open_engine(
            bundle,
            manifest,
            engine,
            attention=attention,
            provider=options["provider"],
            provider_options=job.provider_options if arm.runs == "onnx" else None,
        )
        return lambda inputs: denoiser(**inputs)
    if arm.runs == "graph":
        from wanexport.exporter.reference.eager import EagerEngine

        return _with_kernel(job, EagerEngine(*_peer_arguments(job, manifest), device=job.device))
    peer = _open_diffusers(job, manifest)
    if arm.compiles == "regional":
        _load_blocks(peer.model, Path(job.package))
    elif arm.compiles:
        peer.model.compile(mode=arm.compiles)
    return _with_kernel(job, peer)


def read_inputs(job: Job) -> dict[str, Any]:
    """Arrays on a CPU, tensors on a GPU; an engine is given its timestep on the host."""
    arrays = load_arrays(Path(job.inputs))
    if job.device == "cpu":
        return arrays
    import torch

    host = {"timestep"} if ARMS[job.arm].runs in BACKENDS else set()
    return {n: a if n in host else torch.from_numpy(a).to(job.device) for n, a in arrays.items()}


def compile_block(job: Job) -> dict[str, Any]:
    """Write the first block of diffusers' model as an AOTInductor package without weights."""
    import torch

    engine = _open_diffusers(job, with_measured_expert(read_manifest(Path(job.bundle))))
    block, inputs = engine.model.blocks[0], read_inputs(job)
    arguments = _arguments_of(block, lambda: engine(inputs))
    configs = {**_WEIGHTLESS, **(_TUNED if job.device == "cuda" else {})}
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
    """Config, geometry, dtype and tensors of a peer, from a file checked as an engine checks it."""
    from wanexport.graphs.weights import bundle_tensors
    from wanexport.runtime.bundle.signature import parameter_shapes

    config = manifest.config
    (weights,) = manifest.weights_of(job.dtype)
    file = check_weights(Path(job.bundle), weights)
    tensors = bundle_tensors(file.path, {name: name for name in parameter_shapes(config)})
    return config, Geometry(**job.geometry), job.dtype, tensors


def _with_kernel(job: Job, forward: Forward) -> Forward:
    """The forward with the arm's attention kernel, which must be chosen at every call."""

    def run(inputs: Inputs) -> Any:
        with _kernel(job):
            return forward(inputs)

    return run


def _kernel(job: Job) -> AbstractContextManager[None]:
    kernel = kernel_of(ARMS[job.arm], job.device, job.dtype)
    if kernel is None:
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernels = {"cudnn": SDPBackend.CUDNN_ATTENTION, "fa2": SDPBackend.FLASH_ATTENTION}
    return sdpa_kernel(kernels[kernel])
