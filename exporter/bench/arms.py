"""The arms of `bench`: what each runs, with which options, and whether it can.

What an arm does not need is not imported at the top: importing is part of its cold start.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from wanexport.runtime.bundle.manifest import EngineRecord, Manifest
from wanexport.runtime.engines.choose import choose_engine
from wanexport.runtime.engines.engine import EngineOptions
from wanexport.runtime.engines.table import ENGINES
from wanexport.runtime.errors import BadRequest, WanExportError

_WHICH = ("backend", "device", "resolution", "frames", "dtype", "weights")  # options of every arm


class Arm(NamedTuple):
    """What an arm runs, an engine of a backend or a peer, on which kernel, compiled how.

    A peer is `graph` or `diffusers`, and the kernel that of attention; None leaves it open.
    """

    name: str
    backend: str | None = None
    peer: str | None = None
    attention: str | None = None
    compiles: str | None = None

    @property
    def code(self) -> str:
        """What arms that differ by kernel or compiler alone have in common."""
        return self.backend or self.peer or ""


_IN_ORDER = (  # in which they are measured while the budget lasts
    Arm("wanexport", "aoti"),
    Arm("tensorrt", "tensorrt"),
    Arm("tensorrt-rtx", "tensorrt-rtx"),
    Arm("onnx", "onnx"),
    Arm("graph", peer="graph", attention="cudnn"),
    Arm("diffusers", peer="diffusers", attention="cudnn"),
    Arm("regional-aoti", peer="diffusers", attention="cudnn", compiles="regional"),
    Arm("compile", peer="diffusers", attention="cudnn", compiles="default"),
    Arm("wanexport-fa4", "aoti", attention="fa4"),
    Arm("wanexport-cudnn", "aoti", attention="cudnn"),
    Arm("wanexport-sdpa", "aoti", attention="sdpa"),
    Arm("diffusers-fa2", peer="diffusers", attention="fa2"),
    Arm("max-autotune", peer="diffusers", attention="cudnn", compiles="max-autotune-no-cudagraphs"),
)
ARMS = {arm.name: arm for arm in _IN_ORDER}


@dataclass(frozen=True)
class Job:
    """What the fresh process is told; all paths are absolute.

    `options` are the keywords of EngineOptions, device, dtype and shape among them. `weights` is
    the file that peers read. `spawned` is the wall clock when the process was started. With
    `compile_only` a regional package is written to `package` and nothing is timed; without, it is
    read from there.
    """

    arm: str
    bundle: str
    options: dict[str, Any]
    geometry: dict[str, int]
    weights: str
    inputs: str  # safetensors file
    velocity: str  # safetensors file to write
    package: str
    rounds: int
    profile: bool
    spawned: float
    compile_only: bool = False

    @property
    def engine(self) -> EngineOptions:
        """Which engine is measured, opened how."""
        return EngineOptions(**self.options)

    @property
    def device(self) -> str:
        """PyTorch's name of the device of every arm."""
        device: str = self.options["device"]
        return device

    @property
    def dtype(self) -> str:
        """The precision of every arm."""
        dtype: str = self.options["dtype"]
        return dtype

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU is measured."""
        return self.device != "cpu"


def kernel_of(arm: Arm, job: Job) -> str | None:
    """The attention kernel an arm insists on: none on a CPU, and none of a peer in fp32."""
    chooses = job.on_gpu and (arm.backend is not None or job.dtype != "fp32")
    return arm.attention if chooses else None


def recorded_kernel(engine: EngineRecord) -> str | None:
    """The kernel or operator of self-attention that an engine was built with, if it says so."""
    attention = getattr(engine.details, "attention", None)
    return attention.get("self") if isinstance(attention, Mapping) else attention


def choose_arms(
    manifest: Manifest, job: Job, against: Sequence[str] | None, backend: str | None
) -> list[str]:
    """The arms asked for, or all that apply. Raises BadRequest for one that cannot run."""
    for name in against or ():
        if name not in ARMS:
            raise BadRequest(f"unknown arm {name!r}: expected some of {', '.join(ARMS)}")
        if reason := _obstacle(name, manifest, job):
            raise BadRequest(f"arm {name} cannot run here: {reason}")
    if against:
        return list(dict.fromkeys(against))
    return [
        name
        for name, arm in ARMS.items()
        if (arm.backend is None or backend in (None, arm.backend))
        and (job.on_gpu or arm.compiles is None)  # which takes minutes on a CPU
        and not _obstacle(name, manifest, job)
        and not _is_other_again(name, manifest, job)
    ]


def _obstacle(name: str, manifest: Manifest, job: Job) -> str:
    """Why an arm cannot run here; empty when it can."""
    arm = ARMS[name]
    try:
        engine = engine_of(name, manifest, job)
        if arm.peer == "diffusers":
            from wanexport.exporter.compare.peers import check_implementation

            check_implementation("diffusers")
    except WanExportError as error:
        return str(error)
    selects = engine is not None or arm.attention == "fa2"
    if selects and arm.attention and not kernel_of(arm, job):
        return f"there is no choice of attention kernels for {job.dtype} on {job.device}"
    if engine and arm.attention == "fa4" and "flash_attention" not in engine.files:
        return f"engine {engine.name} has no FlashAttention-4 kernel"
    return ""


def _is_other_again(name: str, manifest: Manifest, job: Job) -> bool:
    """Whether an arm insists on the kernel that its engine has anyway: another arm runs that."""
    engine, kernel = engine_of(name, manifest, job), ARMS[name].attention
    return engine is not None and kernel is not None and kernel == recorded_kernel(engine)


def engine_of(name: str, manifest: Manifest, job: Job) -> EngineRecord | None:
    """The engine that an arm runs, None of a peer. Raises WanExportError when there is none."""
    arm = ARMS[name]
    if arm.backend is None:
        return None
    return choose_engine(Path(job.bundle), manifest, options_of(arm, job)).record


def options_of(arm: Arm, job: Job) -> EngineOptions:
    """How an arm's engine is chosen and opened: as the job's, as far as its backend has options."""
    assert arm.backend is not None
    asked = replace(job.engine, backend=arm.backend)
    if kernel := kernel_of(arm, job):
        asked = replace(asked, attention=kernel)
    taken = {*_WHICH, *ENGINES[arm.backend].backend().OPTIONS}
    return EngineOptions(**{name: v for name, v in asked.given().items() if name in taken})
