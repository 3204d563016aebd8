"""The record of a `wanexport run`: what repeats it, its command line too, and what it cost."""

import os
import platform
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from wanexport.exporter.run.request import RunRequest
from wanexport.runtime.bundle.manifest import BASE, read_manifest, weights_label
from wanexport.runtime.denoiser import Denoiser
from wanexport.runtime.engines.device_name import device_kind
from wanexport.runtime.engines.engine import EngineOptions
from wanexport.runtime.machine.memory import peak_gpu_bytes, peak_rss
from wanexport.runtime.sample import fill, with_recipe
from wanexport.runtime.settings import Settings

_LIBRARIES = (  # whose versions a result depends on
    "wanexport", "numpy", "torch", "onnxruntime", "onnxruntime-gpu", "tensorrt-cu13",
    "tensorrt-rtx-cu13-bindings", "tokenizers", "diffusers", "ftfy", "av", "pillow",
)  # fmt: skip


@dataclass(frozen=True)
class RunResult:
    """What sampling gave; `facts` go into the record as they are."""

    denoiser: Denoiser
    latent: np.ndarray
    load_seconds: float
    seconds_per_step: float
    facts: dict[str, Any]


def run_record(request: RunRequest, result: RunResult) -> dict[str, Any]:
    """Everything that repeating the run takes, and what it cost."""
    engine, geometry = result.denoiser.record, result.denoiser.geometry
    return {
        "output": str(request.output),
        "command": shlex.join(_command(request, result)),
        "bundle": str(request.bundle.resolve()),
        "engine": engine.name,
        "key": engine.key,
        "weights": own_weights(request.bundle, result.denoiser),
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
        "offload": result.denoiser.offload,
        "resident_blocks": result.denoiser.resident_blocks,
        "expert_switch_seconds": result.denoiser.switch_seconds,
        **cost_of(),
    }


def cost_of() -> dict[str, Any]:
    """The memory that this process took, and the versions of what it ran."""
    return {
        "peak_rss_bytes": peak_rss(),
        "peak_gpu_bytes": peak_gpu_bytes(),
        "versions": {"python": platform.python_version(), **_versions()},
    }


def own_weights(bundle: Path, denoiser: Denoiser) -> dict[str, str | None]:
    """The hash of each of the set's files in the bundle; of weights from elsewhere, their path."""
    name = denoiser.weights
    own = read_manifest(bundle).weights_of(denoiser.record.layout, name or BASE)
    if name and not own:
        return {str(absolute(Path(name))): None}
    return {weights_label(w.name, w.expert, w.dtype): w.file.sha256 for w in own}


def _filled(request: RunRequest, denoiser: Denoiser) -> Settings:
    """What the run was asked for, with what the model and its set have for the rest."""
    return fill(*with_recipe(denoiser, request.settings))


def _settings(request: RunRequest, denoiser: Denoiser) -> dict[str, Any]:
    """Steps and shift, as they were or as the model has them; no shift with explicit timesteps."""
    filled = _filled(request, denoiser)
    return {
        "steps": filled.steps,
        "shift": filled.shift if filled.timesteps is None else None,
    }


def _command(request: RunRequest, result: RunResult) -> list[str]:
    """The command line that repeats the run, with everything said that was left open."""
    options = {
        "--prompt": request.prompt,
        "--negative": result.facts.get("negative"),
        "--text": absolute(request.text_file),
        "--image": absolute(request.image),
        "--last-image": absolute(request.last_image),
        "--model": absolute(request.model),
        "--seed": request.seed,
        **_sampling_options(request, result),
        "--output": absolute(request.output),
    }
    words = ["wanexport", "run", str(request.bundle.resolve())]
    for name, value in options.items():
        words += [] if value is None else [name, str(value)]
    # A command that repeats a run meets what that run wrote.
    return [*words, *engine_words(engine_in_full(request, result.denoiser)), "--overwrite"]


def engine_in_full(request: RunRequest, denoiser: Denoiser) -> EngineOptions:
    """The options of the engine that ran, where the request left them open too."""
    record, geometry, asked = denoiser.record, denoiser.geometry, request.engine
    weights = asked.weights
    if weights is not None and str(weights) not in _set_names(request.bundle):
        weights = absolute(Path(weights))
    return replace(
        asked,
        backend=record.backend,
        device=asked.device or device_kind(denoiser.device),
        resolution=f"{geometry.height}x{geometry.width}",
        frames=geometry.frames,
        chunk=geometry.chunk or None,
        cache=geometry.cache or None,
        dtype=record.dtype,
        weights=weights,
        offload=denoiser.offload,
        resident_blocks=denoiser.resident_blocks,
    )


def _set_names(bundle: Path) -> set[str]:
    return {weights.name for weights in read_manifest(bundle).weights.values()}


def engine_words(options: EngineOptions) -> list[str]:
    """Options as words of a command line: each has its field's name, one of pairs in singular."""
    words: list[str] = []
    for name, value in options.given().items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(option if value else option.replace("--", "--no-"))
        elif isinstance(value, Mapping):
            singular = option.removesuffix("s")
            words += [word for pair in value.items() for word in (singular, "=".join(pair))]
        else:
            words += [option, str(value)]
    return words


def _sampling_options(request: RunRequest, result: RunResult) -> dict[str, Any]:
    filled = _filled(request, result.denoiser)
    guidance, timesteps = filled.guidance, filled.timesteps
    pair = guidance if isinstance(guidance, tuple) else (guidance,)
    return {
        "--steps": filled.steps if timesteps is None else None,
        "--shift": filled.shift if timesteps is None else None,
        "--timesteps": None if timesteps is None else ",".join(map(repr, timesteps)),
        "--solver": result.facts["solver"],
        "--guidance": ",".join(map(repr, pair if len(set(pair)) > 1 else pair[:1])),
    }


def absolute(path: str | Path | None) -> str | None:
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
