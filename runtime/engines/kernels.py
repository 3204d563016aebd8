"""The kinds of attention, the kernels of AOTInductor engines for them, and where each runs."""

from collections.abc import Mapping

from wanexport.runtime.errors import BadRequest
from wanexport.runtime.program import ATTENTION_KINDS

KERNELS = ("fa4", "cudnn", "sdpa")
_HALF = ("bf16", "fp16")
_CUDNN_NEEDS = 80  # compute capability: NVIDIA's Ampere


def check_kind(kind: str) -> None:
    """Raise BadRequest for a kind of attention that no kernel is chosen by."""
    if kind not in ATTENTION_KINDS:
        expected = ", ".join(ATTENTION_KINDS)
        raise BadRequest(f"unknown kind of attention {kind!r}: expected one of {expected}")


def kernel_obstacle(kernel: str, target: Mapping[str, str], dtype: str) -> str:
    """Why a kernel cannot run on a target (`device`, `arch`) in a dtype; empty when it can."""
    if kernel not in KERNELS:
        return f"unknown kernel {kernel!r}: expected one of {', '.join(KERNELS)}"
    if kernel == "sdpa":  # PyTorch chooses what runs
        return ""
    arch = target["arch"]
    if target["device"] != "cuda":
        return f"{kernel} runs on a GPU, not on {target['device']}: choose sdpa"
    if dtype not in _HALF:
        return f"{kernel} runs in {' or '.join(_HALF)}, not in {dtype}: choose sdpa"
    if kernel == "fa4" and not arch.startswith("sm9"):
        return f"fa4 runs on Hopper GPUs (sm90), not on {arch}: choose cudnn"
    if kernel == "cudnn" and int(arch.removeprefix("sm")) < _CUDNN_NEEDS:
        return f"cudnn runs on sm{_CUDNN_NEEDS} and newer GPUs, not on {arch}: choose sdpa"
    return ""


def check_kernel(kernel: str | None, target: Mapping[str, str], dtype: str) -> None:
    """Raise BadRequest when a kernel cannot run on a target in a dtype; None is no choice."""
    obstacle = kernel_obstacle(kernel, target, dtype) if kernel is not None else ""
    if obstacle:
        raise BadRequest(f"attention: {obstacle}, or leave it out")
