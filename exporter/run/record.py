"""The record of a `wanexport run`: what repeats it, its command line too, and what it cost."""

import os
import platform
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from wanexport.exporter.run.request import RunRequest
from wanexport.runtime.bundle.manifest import read_manifest
from wanexport.runtime.denoiser import Denoiser
from wanexport.runtime.machine.memory import peak_gpu_bytes, peak_rss

_LIBRARIES = (  # whose versions a result depends on
    "wanexport", "numpy", "torch", "onnxruntime", "onnxruntime-gpu", "tensorrt-cu13",
    "tensorrt-rtx-cu13-bindings", "transformers", "diffusers", "ftfy", "av", "pillow",
)  # fmt: skip


@dataclass(frozen=True)
class RunResult:
    """What sampling gave; `facts` go into the record as they are."""

    denoiser: Denoiser
    latent: np.ndarray
    video: np.ndarray | None
    load_seconds: float
    seconds_per_step: float
    facts: dict[str, Any]


def run_record(request: RunRequest, result: RunResult) -> dict[str, Any]:
    """Everything that repeating the run takes, and what it cost."""
    engine, geometry = result.denoiser.record, result.denoiser.geometry
    weights = read_manifest(request.bundle).weights.items()
    return {
        "output": str(request.output),
        "command": shlex.join(_command(request, result)),
        "bundle": str(request.bundle.resolve()),
        "engine": engine.name,
        "key": engine.key,
        "weights": {n: w.file.sha256 for n, w in weights if w.dtype == engine.dtype},
        "shape": list(result.latent.shape),
        "height": geometry.height,
        "width": geometry.width,
        "frames": geometry.frames,
        "fps": engine.sampling.fps,
        "seed": request.seed,
        **_settings(request, result.denoiser),
        **result.facts,
        "load_seconds": round(result.load_seconds, 3),
        "seconds_per_step": round(result.seconds_per_step, 3),
        "peak_rss_bytes": peak_rss(),
        "peak_gpu_bytes": peak_gpu_bytes(),
        "expert_switch_seconds": result.denoiser.switch_seconds,
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _settings(request: RunRequest, denoiser: Denoiser) -> dict[str, Any]:
    """Steps and shift, as they were or as the model has them; none with explicit timesteps."""
    if request.settings.get("timesteps") is not None:
        return {"steps": len(request.settings["timesteps"]), "shift": None}
    given, defaults = request.settings, denoiser.sampling
    steps, shift = given.get("steps"), given.get("shift")
    return {
        "steps": defaults.steps if steps is None else steps,
        "shift": defaults.shift if shift is None else shift,
    }


def _command(request: RunRequest, result: RunResult) -> list[str]:
    """The command line that repeats the run, with everything said that was left open."""
    engine, geometry = result.denoiser.record, result.denoiser.geometry
    options = {
        "--prompt": request.prompt,
        "--negative": result.facts.get("negative"),
        "--text": _absolute(request.text_file),
        "--image": _absolute(request.image),
        "--last-image": _absolute(request.last_image),
        "--model": _absolute(request.model),
        "--seed": request.seed,
        **_sampling_options(request, result),
        "--resolution": f"{geometry.height}x{geometry.width}",
        "--frames": geometry.frames,
        "--backend": engine.backend,
        "--dtype": engine.dtype,
        "--device": engine.target["device"],
        **{f"--{name}": request.load_options.get(name) for name in ("provider", "attention")},
        "--output": _absolute(request.output),
    }
    words = ["wanexport", "run", str(request.bundle.resolve())]
    for name, value in options.items():
        words += [] if value is None else [name, str(value)]
    # A command that repeats a run meets what that run wrote.
    return [*words, "--overwrite", *_flags(request.load_options)]


def _sampling_options(request: RunRequest, result: RunResult) -> dict[str, Any]:
    timesteps, guidance = (request.settings.get(name) for name in ("timesteps", "guidance"))
    settings = _settings(request, result.denoiser)
    if guidance is None:
        guidance = result.denoiser.sampling.guidance if timesteps is None else 1.0
    pair = guidance if isinstance(guidance, tuple) else (guidance,)
    return {
        "--steps": settings["steps"] if timesteps is None else None,
        "--shift": settings["shift"],
        "--timesteps": None if timesteps is None else ",".join(map(repr, timesteps)),
        "--solver": result.facts["solver"],
        "--guidance": ",".join(map(repr, pair if len(set(pair)) > 1 else pair[:1])),
    }


def _flags(load_options: Mapping[str, Any]) -> list[str]:
    words = ["--offload"] if load_options.get("offload") else []
    if (graph := load_options.get("cuda_graph")) is not None:
        words.append("--cuda-graph" if graph else "--no-cuda-graph")
    for name, value in (load_options.get("provider_options") or {}).items():
        words += ["--provider-option", f"{name}={value}"]
    return words


def _absolute(path: str | Path | None) -> str | None:
    """A path that means the same in another folder; a hub id stays as it is."""
    if path is None:
        return None
    is_file = isinstance(path, Path) or os.path.exists(path)
    return str(Path(path).resolve()) if is_file else str(path)


def _versions() -> dict[str, str]:
    """Of the libraries that are installed."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
