"""`wanexport compare`: an engine against a reference, step by step, on the same inputs.

The reference is the graph in eager fp32 with the bundle's weights, or diffusers' model, or recorded
velocities; the floor is eager in the engine's own precision. Each step is teacher-forced: engine
and floor are given what the reference was given. Beside it stand the free-running drift, where the
engine follows its own latents, and the solver against its fp64 oracle.
"""

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from wanexport.exporter.build import Progress
from wanexport.exporter.comparison import Recorder, compare_runs
from wanexport.exporter.parity import seeded_inputs
from wanexport.exporter.peers import (
    IMPLEMENTATIONS,
    open_peers,
    tensors_of_bundle,
    tensors_of_checkpoint,
)
from wanexport.exporter.recorded import (
    is_of_calls,
    read_calls,
    read_sample_inputs,
    read_velocities,
)
from wanexport.graphs.config import WanConfig
from wanexport.graphs.weights import DTYPES
from wanexport.runtime.durable import write_durably
from wanexport.runtime.errors import WanExportError
from wanexport.runtime.load import choose_engine, open_engine
from wanexport.runtime.manifest import EngineRecord, bundle_lock, read_manifest, write_manifest
from wanexport.runtime.memory import peak_rss
from wanexport.runtime.tensorfile import save_arrays


def compare(
    bundle: str | Path,
    *,
    model: str | None = None,
    reference: str = "graph",
    inputs: str | Path | None = None,
    outputs: str | Path | None = None,
    outputs_dtype: str = "fp32",
    backend: str | None = None,
    resolution: str | None = None,
    frames: int | None = None,
    dtype: str | None = None,
    steps: int = 4,
    seed: int = 0,
    report: str | Path | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Compare one engine of a bundle with a reference; the result says whether it passed.

    reference is `graph` or `diffusers`, fp32 with the bundle's weights; model names the checkpoint
    to take the reference's tensors from instead. The loop has `steps` steps with the bundle's
    solver and guidance. inputs is a safetensors file for that loop (as `run` takes it), or of
    single calls, and outputs the velocities recorded for these calls, computed in outputs_dtype
    (see `recorded`). The result is saved in report, by default the bundle's `reports/`.
    Raises WanExportError when no engine fits or cannot run here, or a file does not fit.
    """
    _check_choices(reference, inputs, outputs, outputs_dtype)
    bundle = Path(bundle)
    manifest = read_manifest(bundle)
    record = choose_engine(
        bundle, manifest, backend=backend, resolution=resolution, frames=frames, dtype=dtype
    )
    given = _read_given(inputs, record, WanConfig(**manifest.config), seed)
    recorded = read_velocities(Path(outputs), len(given), record.output) if outputs else None
    tensors = tensors_of_bundle(bundle, manifest, record)
    started = time.perf_counter()
    engine = Recorder(open_engine(bundle, manifest, record))
    opened = time.perf_counter()
    peers = open_peers(
        manifest,
        record,
        tensors_of_checkpoint(model, manifest) if model else tensors,
        implementation=reference,
        is_checkpoint=model is not None,
        recorded_dtype=None if recorded is None else outputs_dtype,
    )
    rows, eager_seconds = compare_runs(
        engine,
        peers,
        given,
        steps=steps,
        recorded=recorded,
        recorded_dtype=None if recorded is None else outputs_dtype,
        progress=progress,
    )
    result = {
        "engine": record.name,
        "reference": reference if recorded is None else "recorded",
        "model": model,
        "passed": all(row["passed"] for row in rows),
        "steps": rows,
        "seed": None if inputs else seed,
        "seconds": {
            "open": round(opened - started, 3),
            "engine_call": _median(engine.seconds),
            "reference_call": _median(eager_seconds),
        },
        "peak_rss_bytes": peak_rss(),
        "warning": None,
    }
    try:
        _save(bundle, record, given if isinstance(given, dict) else {}, result, report)
    except (OSError, WanExportError) as error:  # the verdict stands without its file
        result["warning"] = f"the report was not saved: {error}"
    return result


def _check_choices(
    reference: str, inputs: str | Path | None, outputs: str | Path | None, outputs_dtype: str
) -> None:
    if reference not in IMPLEMENTATIONS:
        raise WanExportError(
            f"unknown reference {reference!r}: expected one of {', '.join(IMPLEMENTATIONS)}"
        )
    if outputs_dtype not in DTYPES:
        raise WanExportError(
            f"unknown outputs dtype {outputs_dtype!r}: expected one of {', '.join(DTYPES)}"
        )
    if outputs and not (inputs and is_of_calls(Path(inputs))):
        raise WanExportError("recorded outputs need the inputs of the same calls: pass both files")
    if outputs and reference != "graph":
        raise WanExportError(f"outputs are a reference themselves: leave out {reference}")


def _read_given(
    inputs: str | Path | None, record: EngineRecord, config: WanConfig, seed: int
) -> dict[str, Any] | list[dict[str, np.ndarray]]:
    """Inputs of a loop, or of each recorded call."""
    seeded = seeded_inputs(config, record.geometry, seed)
    if inputs is None:
        return seeded
    path = Path(inputs)
    if is_of_calls(path):
        return read_calls(path, record.inputs)
    return {"noise": seeded["noise"], **read_sample_inputs(path)}


def _median(seconds: Sequence[float]) -> float | None:
    return round(statistics.median(seconds), 4) if seconds else None


def _save(
    bundle: Path,
    engine: EngineRecord,
    inputs: Mapping[str, np.ndarray],
    result: Mapping[str, Any],
    report: str | Path | None,
) -> None:
    """Write the report, and in the bundle's own note the summary in the manifest."""
    folder = bundle / "reports" if report is None else Path(report)
    folder.mkdir(parents=True, exist_ok=True)
    suffix = "" if result["reference"] == "graph" else f"-{result['reference']}"
    name = f"compare-{engine.name.replace('/', '-')}{suffix}"
    if inputs:
        save_arrays(folder / f"{name}-inputs.safetensors", inputs)
    write_durably(folder / f"{name}.json", (json.dumps(result, indent=1) + "\n").encode())
    if report is None:
        _note_parity(bundle, engine, result)


def _note_parity(bundle: Path, engine: EngineRecord, result: Mapping[str, Any]) -> None:
    """Keep the summary in the manifest, unless the engine was rebuilt meanwhile."""
    worst = max(result["steps"], key=lambda row: (not row["passed"], row["error"] or 0))
    parity = {name: worst[name] for name in ("error", "floor", "gate", "passed")}
    parity["reference"] = result["reference"]
    with bundle_lock(bundle):
        manifest = read_manifest(bundle)
        engines = tuple(replace(e, parity=parity) if e == engine else e for e in manifest.engines)
        write_manifest(bundle, replace(manifest, engines=engines))
