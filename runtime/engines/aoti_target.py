"""What an AOTInductor engine is bound to: the device, its instructions, and PyTorch's version."""

import platform
from collections.abc import Mapping

import torch

from wanexport.runtime.bundle.manifest import EngineRecord
from wanexport.runtime.engines.device import gpu_or_cpu
from wanexport.runtime.engines.engine import EngineOptions
from wanexport.runtime.engines.processor import level_for, level_here, runs_here
from wanexport.runtime.errors import WanExportError

# What compiled code depends on, of what `versions` says.
BINDING = ("device", "arch", "march", "instructions", "torch", "cuda")


def refusal(record: EngineRecord, device: str, options: EngineOptions, rebuild: str) -> str:
    """Why this machine cannot execute the engine on a device; empty when it can.

    rebuild is the command that makes an engine for it.
    """
    try:
        differing = mismatches(record.target, device)
    except WanExportError as error:
        return f"engine {record.name} is for a GPU: {error}"
    if not differing:
        return ""
    found = "; ".join(differing)
    return f"engine {record.name} was compiled for {found}: build it here with {rebuild}"


def versions(device: str) -> dict[str, str]:
    """What an engine compiled for a device here is bound to; the manifest records it and `load`
    compares. The device is PyTorch's name, `cpu`, `cuda` or `cuda:1`.

    Raises EngineFailure when it is not there.
    """
    if device == "cpu":
        return {
            "device": "cpu",
            "arch": platform.machine(),
            "march": level_for("cpu"),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "torch": torch.__version__,
        }
    gpu = gpu_or_cpu(device)
    major, minor = torch.cuda.get_device_capability(gpu)
    return {
        "device": "cuda",
        "arch": f"sm{major}{minor}",
        "march": level_for("cuda"),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "gpu": torch.cuda.get_device_name(gpu),
    }


def mismatches(target: Mapping[str, str], device: str | None = None) -> list[str]:
    """What of an engine's target is not so here, as `torch 2.11.0, here 2.13.0`.

    Raises EngineFailure when its device is not there.
    """
    here = versions(device or target["device"])
    # A package runs on any processor that has the instructions it was compiled for.
    here["march"] = target["march"] if runs_here(target.get("march", "?")) else level_here()
    differing = [name for name in BINDING if here.get(name) != target.get(name)]
    return [f"{name} {target.get(name)}, here {here.get(name)}" for name in differing]
