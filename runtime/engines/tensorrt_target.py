"""What a TensorRT plan is bound to: the GPU's architecture and the version, unless it was built to
serve more."""

import torch
from packaging.version import Version

from wanexport.runtime.bundle.manifest import EngineRecord
from wanexport.runtime.engines.device import gpu_or_cpu
from wanexport.runtime.engines.tensorrt_library import FLAVOURS, import_tensorrt
from wanexport.runtime.errors import EngineFailure, WanExportError

_COMPATIBLE_FROM = 80  # Ampere, where TensorRT's hardware compatibility begins


def refusal(engine: EngineRecord, device: str, rebuild: str) -> str:
    """Why this machine cannot execute the engine on a device, empty when it can; rebuild is the
    command that makes one for it."""
    flavour = engine.backend
    try:
        here = versions(flavour, device)
    except WanExportError as error:
        return f"engine {engine.name} cannot run here: {error}"
    differing = [
        name
        for name, fits in (("arch", _fits_arch), (flavour, _fits_version))
        if not fits(engine, engine.target[name], here[name])
    ]
    if not differing:
        return ""
    found = "; ".join(f"{name} {engine.target[name]}, here {here[name]}" for name in differing)
    return f"engine {engine.name} was built for {found}: build it here with {rebuild}"


def versions(flavour: str, device: str = "cuda") -> dict[str, str]:
    """What a plan that is built for a GPU of this machine is bound to.

    Raises BundleError when TensorRT is not installed, EngineFailure when there is no such GPU.
    """
    trt = import_tensorrt(flavour)
    if not torch.cuda.is_available():
        raise EngineFailure(
            f"{FLAVOURS[flavour].title} needs an NVIDIA GPU and PyTorch for CUDA, which finds "
            f"none: choose one of another --backend"
        )
    return {"device": "cuda", "arch": arch(gpu_or_cpu(device)), flavour: trt.__version__}


def arch(device: torch.device | None = None) -> str:
    """The architecture of a GPU, by default the current one, as in `sm89`."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def _fits_arch(engine: EngineRecord, built: str, here: str) -> bool:
    if engine.details.hardware_compatible:
        return int(here.removeprefix("sm")) >= _COMPATIBLE_FROM
    return built == here


def _fits_version(engine: EngineRecord, built: str, here: str) -> bool:
    if engine.details.version_compatible:
        return Version(here) >= Version(built)
    return built == here
