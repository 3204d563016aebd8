"""Which engine of a bundle runs here, and runs best."""

import importlib.util
import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from wanexport.runtime.bundle.manifest import EngineRecord, Manifest
from wanexport.runtime.bundle.usable import why_unusable
from wanexport.runtime.engines.onnx_providers import PROVIDERS, gpu_obstacle
from wanexport.runtime.engines.tensorrt_library import FLAVOURS
from wanexport.runtime.errors import WanExportError, WanExportWarning, needing_package
from wanexport.runtime.geometry import parse_resolution

BACKENDS = ("onnx", "aoti", "tensorrt", "tensorrt-rtx")
DEVICES = ("cpu", "cuda")
RUNNABLE_DTYPES = ("fp16", "fp32")  # what ONNX Runtime executes on a CPU
# The fastest on a GPU, on a CPU the exact one, and of two exact ones the one that maps its weights.
_PREFERENCE = [
    *(("aoti", "cuda", dtype) for dtype in ("bf16", "fp16", "fp32")),
    *(("tensorrt", "cuda", dtype) for dtype in ("bf16", "fp16", "fp32")),
    *(("tensorrt-rtx", "cuda", dtype) for dtype in ("bf16", "fp16", "fp32")),
    *(("onnx", "cuda", dtype) for dtype in ("bf16", "fp16", "fp32")),
    *(("onnx", "cpu", dtype) for dtype in ("fp32", "fp16")),
    *(("aoti", "cpu", dtype) for dtype in ("fp32", "bf16", "fp16")),
]


def choose_engine(
    bundle: Path,
    manifest: Manifest,
    *,
    backend: str | None = None,
    device: str | None = None,
    resolution: str | None = None,
    frames: int | None = None,
    dtype: str | None = None,
    provider: str | None = None,
) -> EngineRecord:
    """The engine that fits and runs here; the target of an ONNX engine names the device.

    Warns when one that would come first cannot run here. Raises WanExportError when none fits or
    none can run, and when engines of several shapes fit, whether they can run here or not.
    """
    if provider is not None:
        backend, device = _of_provider(provider, backend, device)
    for what, value, known in (("device", device, DEVICES), ("backend", backend, BACKENDS)):
        if value not in (None, *known):
            raise WanExportError(f"unknown {what} {value!r}: expected one of {', '.join(known)}")
    size = None if resolution is None else parse_resolution(resolution)
    fitting = [
        engine
        for engine in manifest.engines
        if engine.backend in BACKENDS
        and backend in (None, engine.backend)
        and dtype in (None, engine.dtype)
        and frames in (None, engine.geometry.frames)
        and size in (None, (engine.geometry.height, engine.geometry.width))
    ]
    fitting = [placed for engine in fitting for placed in _on_devices(engine, device)]
    held = ", ".join(engine.name for engine in manifest.engines)
    if not fitting:
        raise WanExportError(
            f"{bundle} has no such engine; it holds {held}: "
            f"choose one, or add yours with wanexport build"
        )
    if len({engine.geometry for engine in fitting}) > 1:
        raise WanExportError(f"{bundle} holds several shapes ({held}): name resolution and frames")
    refusals = [
        why_unusable(bundle, manifest, engine) or _refusal(bundle, engine, provider or "cuda")
        for engine in fitting
    ]
    runnable = [engine for engine, refusal in zip(fitting, refusals) if not refusal]
    if not runnable:
        raise WanExportError("; ".join(dict.fromkeys(refusals)))
    chosen = min(runnable, key=_preference)
    _tell_of_better(chosen, dict(zip(refusals, fitting)))
    return chosen


def _tell_of_better(chosen: EngineRecord, refused: Mapping[str, EngineRecord]) -> None:
    """Warn of engines that would run in the chosen one's place, by the reason why they cannot."""
    reasons = [
        reason
        for reason, engine in refused.items()
        if reason and _place(engine) < _place(chosen) and (engine.backend != "onnx" or _has_gpu())
    ]
    if reasons:
        warnings.warn(
            f"{'; '.join(reasons)}: engine {chosen.name} runs on {chosen.target['device']} instead",
            WanExportWarning,
            stacklevel=3,
        )


def _has_gpu() -> bool:
    """Whether this machine has a GPU that the user has not hidden: without one, a CPU is what an
    ONNX engine, which is bound to no device, is meant to run on."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return not hidden and any(map(os.path.exists, ("/dev/nvidiactl", "/dev/dxg")))


def _of_provider(provider: str, backend: str | None, device: str | None) -> tuple[str, str]:
    """Backend and device that a provider implies. Raises WanExportError when others were chosen."""
    if provider not in PROVIDERS:
        raise WanExportError(
            f"unknown provider {provider!r}: expected one of {', '.join(PROVIDERS)}"
        )
    implied = ("onnx", "cpu" if provider == "cpu" else "cuda")
    for chosen, own in zip((backend, device), implied):
        if chosen not in (None, own):
            raise WanExportError(f"provider {provider} is of {own}, not of {chosen}: leave one out")
    return implied


def _on_devices(engine: EngineRecord, device: str | None) -> list[EngineRecord]:
    """The engine for each device that it could run on: an ONNX engine is bound to none."""
    if engine.backend != "onnx":
        return [engine] if device in (None, engine.target.get("device")) else []
    return [
        replace(engine, target={**engine.target, "device": name})
        for name in ((device,) if device else DEVICES)
    ]


def _preference(engine: EngineRecord) -> tuple[int, bool]:
    """What sorts first runs best; a TensorRT plan that serves more GPUs or versions is slower."""
    names = ("hardware_compatible", "version_compatible")
    return _place(engine), any(engine.build.get(name) for name in names)


def _place(engine: EngineRecord) -> int:
    kind = (engine.backend, engine.target.get("device"), engine.dtype)
    return _PREFERENCE.index(kind) if kind in _PREFERENCE else len(_PREFERENCE)


def _refusal(bundle: Path, engine: EngineRecord, provider: str) -> str:
    """Why this machine cannot execute the engine; empty when it can."""
    if engine.backend == "onnx" and engine.target["device"] == "cuda":
        obstacle = gpu_obstacle(provider)
        return obstacle and f"engine {engine.name} cannot run on a GPU: {obstacle}"
    if engine.backend == "onnx":
        if engine.dtype in RUNNABLE_DTYPES:
            return ""
        return (
            f"engine {engine.name} is {engine.dtype}, which ONNX Runtime cannot execute "
            f"on a CPU: add an engine with wanexport build --dtype fp32, or run this one on a GPU "
            f"with onnxruntime-gpu"
        )
    size = f"{engine.geometry.height}x{engine.geometry.width}"
    rebuild = (
        f"wanexport build --backend {engine.backend} --resolution {size} "
        f"--frames {engine.geometry.frames} -o {bundle}"
    )
    if importlib.util.find_spec("torch") is None:
        bound = "torch" in engine.target
        wanted = "==" + engine.target["torch"].partition("+")[0] if bound else ""
        return f"engine {engine.name} needs PyTorch: pip install torch{wanted}"
    try:
        with needing_package("torch", f"engine {engine.name}"):
            import torch  # noqa: F401
    except WanExportError as error:  # installed, and broken
        return str(error)
    if engine.backend in FLAVOURS:
        from wanexport.runtime.engines.tensorrt_target import refusal

        return refusal(engine, rebuild)
    from wanexport.runtime.engines import aoti as aoti_engine

    try:
        differing = aoti_engine.mismatches(engine.target)
    except WanExportError as error:
        return f"engine {engine.name} is for a GPU: {error}"
    if not differing:
        return ""
    found = "; ".join(differing)
    return f"engine {engine.name} was compiled for {found}: build it here with {rebuild}"
