"""`wanexport compare`: an engine against eager PyTorch, step by step, on seeded inputs.

The reference is the same graph in eager fp32 with the bundle's weights; the floor is eager in the
engine's own precision. Each step is teacher-forced: engine and floor are given what the reference
was given. The free-running drift, where the engine follows its own latents, is reported beside it.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from wanexport.exporter.build import Progress
from wanexport.exporter.eager import EagerEngine
from wanexport.exporter.parity import Parity, measure, relative_l2, seeded_inputs
from wanexport.graphs.config import WanConfig
from wanexport.graphs.signature import parameter_shapes
from wanexport.graphs.weights import bundle_tensors
from wanexport.runtime.denoiser import Denoiser
from wanexport.runtime.durable import write_durably
from wanexport.runtime.errors import WanExportError
from wanexport.runtime.load import WEIGHTS_FILE, choose_engine, open_engine, weights_folders
from wanexport.runtime.manifest import (
    EngineRecord,
    Manifest,
    bundle_lock,
    read_manifest,
    write_manifest,
)
from wanexport.runtime.sample import sample
from wanexport.runtime.tensorfile import save_arrays


class Recorder:
    """A denoiser that keeps every call's inputs and velocity."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser
        self.sampling = denoiser.sampling
        self.calls: list[tuple[dict[str, Any], np.ndarray]] = []

    def __call__(self, **inputs: Any) -> np.ndarray:
        """Call the denoiser."""
        velocity: np.ndarray = self.denoiser(**inputs)
        self.calls.append((inputs, velocity))
        return velocity


def compare(
    bundle: str | Path,
    *,
    backend: str | None = None,
    resolution: str | None = None,
    frames: int | None = None,
    dtype: str | None = None,
    steps: int = 4,
    seed: int = 0,
    report: str | Path | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Compare one engine of a bundle with eager PyTorch; the result says whether it passed.

    The loop has `steps` steps with the bundle's solver and guidance; its first call stands for one
    forward. The inputs and the result are saved in report, by default the bundle's `reports/`.
    Raises WanExportError when no engine fits or it cannot run here.
    """
    bundle = Path(bundle)
    manifest = read_manifest(bundle)
    record = choose_engine(
        bundle, manifest, backend=backend, resolution=resolution, frames=frames, dtype=dtype
    )
    config = WanConfig(**manifest.config)
    inputs = seeded_inputs(config, record.geometry, seed)
    engine = open_engine(bundle, manifest, record)
    reference = Recorder(_eager(bundle, manifest, engine, config, "fp32"))
    floor = (
        _eager(bundle, manifest, engine, config, record.dtype) if record.dtype != "fp32" else None
    )
    expected = _latents(reference, inputs, steps, progress, "eager reference")
    compared: list[Parity] = []
    for call in reference.calls:
        progress("engine on the same inputs", len(compared), len(reference.calls))
        compared.append(_compare_call(engine, floor, call))
    own = _latents(engine, inputs, steps, progress, "engine on its own")
    drift = [relative_l2(latent, exact) for latent, exact in zip(own, expected, strict=True)]
    result = _result(record, compared, drift, seed)
    try:
        _save(bundle / "reports" if report is None else Path(report), record, inputs, result)
        if report is None:
            _note_parity(bundle, record, result)
    except (OSError, WanExportError) as error:  # the verdict stands without its file
        result["warning"] = f"the report was not saved: {error}"
    return result


def _latents(
    denoiser: Denoiser | Recorder,
    inputs: Mapping[str, Any],
    steps: int,
    progress: Progress,
    stage: str,
) -> list[np.ndarray]:
    """The latent after each step of a free run."""
    latents: list[np.ndarray] = []
    progress(stage, 0, steps)
    for step in sample(denoiser, steps=steps, **inputs):
        latents.append(step.latent)
        progress(stage, len(latents), steps)
    return latents


def _eager(
    bundle: Path, manifest: Manifest, engine: Denoiser, config: WanConfig, dtype: str
) -> Denoiser:
    """The same model in eager PyTorch, with the engine's own weights."""
    names = {name: name for name in parameter_shapes(config)}
    folders = weights_folders(bundle, manifest, engine.record, None)
    engines = {
        expert: EagerEngine(
            config, engine.geometry, dtype, bundle_tensors(folder / WEIGHTS_FILE, names)
        )
        for expert, folder in folders.items()
    }
    return Denoiser(engine.record, engines)


def _compare_call(
    engine: Denoiser, floor: Denoiser | None, call: tuple[Mapping[str, Any], np.ndarray]
) -> Parity:
    inputs, reference = call
    floor_velocity = None if floor is None else floor(**inputs)
    return measure(engine(**inputs), reference, floor_velocity)


def _result(
    engine: EngineRecord, compared: list[Parity], drift: list[float], seed: int
) -> dict[str, Any]:
    """One row per step; of a step's two guidance calls the worse one counts."""
    per_step = len(compared) // len(drift)
    rows = []
    for index, latent_drift in enumerate(drift):
        calls = compared[index * per_step : (index + 1) * per_step]
        worst = max(calls, key=lambda parity: (not parity.passed, parity.error / parity.gate))
        rows.append({"step": index, **_row(worst), "drift": _number(latent_drift)})
    return {
        "engine": engine.name,
        "passed": all(row["passed"] and row["drift"] is not None for row in rows),
        "forward": _row(compared[0]),
        "steps": rows,
        "seed": seed,
        "warning": None,
    }


def _row(parity: Parity) -> dict[str, Any]:
    """The figures as JSON has them: null stands for an output with NaN or Inf."""
    return {
        "error": _number(parity.error),
        "floor": None if parity.floor is None else _number(parity.floor),
        "gate": parity.gate,
        "passed": parity.passed,
    }


def _number(value: float) -> float | None:
    return value if isfinite(value) else None


def _save(
    folder: Path,
    engine: EngineRecord,
    inputs: Mapping[str, np.ndarray],
    result: Mapping[str, Any],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = f"compare-{engine.name.replace('/', '-')}"
    save_arrays(folder / f"{name}-inputs.safetensors", inputs)
    write_durably(folder / f"{name}.json", (json.dumps(result, indent=1) + "\n").encode())


def _note_parity(bundle: Path, engine: EngineRecord, result: Mapping[str, Any]) -> None:
    """Keep the summary in the manifest, unless the engine was rebuilt meanwhile."""
    worst = max(result["steps"], key=lambda row: (not row["passed"], row["error"] or 0))
    parity = {name: worst[name] for name in ("error", "floor", "gate", "passed")}
    with bundle_lock(bundle):
        manifest = read_manifest(bundle)
        engines = tuple(replace(e, parity=parity) if e == engine else e for e in manifest.engines)
        write_manifest(bundle, replace(manifest, engines=engines))
