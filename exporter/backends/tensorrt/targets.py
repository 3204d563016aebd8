"""Which GPUs plans are built for, and which options each flavour of TensorRT has."""

from collections.abc import Sequence
from typing import Any

import torch

from wanexport.exporter.backends.backend import TensorRtOptions
from wanexport.runtime.engines.device import gpu_or_cpu
from wanexport.runtime.engines.onnx import import_onnxruntime
from wanexport.runtime.engines.tensorrt_library import import_tensorrt
from wanexport.runtime.engines.tensorrt_target import arch
from wanexport.runtime.errors import BadRequest


def find_targets(
    flavour: str, options: TensorRtOptions, device: str = "cuda"
) -> list[dict[str, str]]:
    """What plans are made for, one each: a GPU here, or with TensorRT for RTX any.

    Raises BadRequest when TensorRT has not the options, or knows no target, and WanExportError when
    it is missing, or ONNX Runtime is for the proof of a plan that cannot run here.
    """
    trt = import_tensorrt(flavour)
    here = gpu_arch(device)
    if flavour == "tensorrt":
        archs = [_own_target(options.targets, here)]
    else:
        _refuse_absent_options(trt, options)
        archs = _rtx_targets(trt, options.targets, here)
    if any(arch != here for arch in archs):
        import_onnxruntime()
    return [{"device": "cuda", "arch": arch, flavour: trt.__version__} for arch in archs]


def _own_target(named: Sequence[str], here: str | None) -> str:
    if named:
        raise BadRequest(
            "TensorRT builds for the GPU that it runs on: leave out --target, or use "
            "--backend tensorrt-rtx"
        )
    if here is None:
        raise BadRequest(
            "TensorRT builds for the GPU that it runs on, and PyTorch finds none here: "
            "build on that machine, or use --backend tensorrt-rtx with --target"
        )
    return here


def gpu_arch(device: str = "cuda") -> str | None:
    """The architecture of a GPU of this machine as `sm89`, None where there is none at all."""
    return arch(gpu_or_cpu(device)) if torch.cuda.is_available() else None


def _refuse_absent_options(trt: Any, options: TensorRtOptions) -> None:
    """Raise BadRequest for what TensorRT for RTX would ignore, or refuse after minutes."""
    absent = {
        "--hardware-compatible": (options.hardware_compatible, "its plans are for one target each"),
        "--version-compatible": (options.version_compatible, "it comes without a lean runtime"),
        "--optimization-level": (
            options.optimization_level is not None,
            "it builds the same plan at every level",
        ),
    }
    for name, (is_asked, reason) in absent.items():
        if is_asked:
            raise BadRequest(
                f"TensorRT for RTX {trt.__version__} has no {name} ({reason}): leave it out"
            )


def _rtx_targets(trt: Any, named: Sequence[str], here: str | None) -> list[str]:
    """Architectures to build for. One that is here is tried even if TensorRT does not list it."""
    choices = sorted(
        (name.lower() for name in trt.ComputeCapability.__members__ if name.startswith("SM")),
        key=lambda name: int(name[2:]),
    )
    archs = list(dict.fromkeys(name.lower() for name in named))
    for name in archs:
        if name not in choices:
            raise BadRequest(
                f"TensorRT for RTX builds for no {name!r}: --target expects of {', '.join(choices)}"
            )
    if not archs and here is None:
        raise BadRequest(
            f"there is no GPU here to build for: name one with --target, of {', '.join(choices)}"
        )
    return archs or [str(here)]
