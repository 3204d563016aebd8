"""`wanexport compare`: an engine against a reference, step by step, on the same inputs.

The reference is the graph in eager fp32 with the bundle's weights, or diffusers' model, or recorded
velocities; the floor is the graph in the engine's own precision. Each step is teacher-forced:
engine and floor are given what the reference was given. Beside it stand the free-running drift,
where the engine follows its own latents, and the solver against its fp64 oracle.
"""

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

from wanexport.exporter.backends.backend import Progress
from wanexport.exporter.bundle.lock import bundle_lock
from wanexport.exporter.bundle.place import REPORTS, check_place
from wanexport.exporter.bundle.writer import write_manifest
from wanexport.exporter.compare.peers import (
    Peers,
    check_implementation,
    needed_peers,
    open_peers,
    tensors_of_bundle,
    tensors_of_checkpoint,
)
from wanexport.exporter.compare.polygraphy import SavedFiles, check_files, save_calls
from wanexport.exporter.compare.recorded import (
    Calls,
    Loop,
    is_of_calls,
    read_calls,
    read_sample_inputs,
    read_velocities,
)
from wanexport.exporter.compare.rows import ComparedCall, Comparison, Recorder, Row
from wanexport.exporter.reference.inputs import seeded_inputs
from wanexport.graphs.weights import DTYPES
from wanexport.runtime.bundle.durable import own_folder, remove_partials, write_durably
from wanexport.runtime.bundle.manifest import EngineRecord, Manifest, read_manifest
from wanexport.runtime.bundle.tensorfile import save_arrays
from wanexport.runtime.engines.choose import choose_engine
from wanexport.runtime.errors import WanExportError, explain, refuse_empty
from wanexport.runtime.load import open_engine
from wanexport.runtime.machine.memory import peak_rss


def compare(
    bundle: str | Path,
    *,
    model: str | Path | None = None,
    reference: str = "graph",
    inputs: str | Path | None = None,
    outputs: str | Path | None = None,
    outputs_dtype: str = "fp32",
    backend: str | None = None,
    device: str | None = None,
    resolution: str | None = None,
    frames: int | None = None,
    dtype: str | None = None,
    provider: str | None = None,
    provider_options: Mapping[str, str] | None = None,
    steps: int = 4,
    seed: int = 0,
    report: str | Path | None = None,
    save_inputs: str | Path | None = None,
    save_outputs: str | Path | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Compare one engine of a bundle with a reference; the result says whether it passed.

    reference is `graph` or `diffusers`: whose fp32 forward with the bundle's weights is right.
    model names the checkpoint to take its tensors from instead. The loop has `steps` steps with the
    bundle's solver and guidance. inputs is a safetensors file for that loop (as `run` takes it), or
    of single calls (see `recorded`), and outputs the velocities recorded for these calls, computed
    in outputs_dtype with the precision policy of reference. The result is saved in report, by
    default the bundle's `reports/`. provider and its options are `load`'s. save_inputs and
    save_outputs are JSON files for polygraphy, of the calls that are compared; `polygraphy` in the
    result has the commands that read them.
    Raises WanExportError when no engine fits or cannot run here, or a file does not fit.
    """
    refuse_empty(bundle=bundle, model=model, inputs=inputs, outputs=outputs, report=report)
    check_implementation(reference)
    saved = SavedFiles(*(None if f is None else Path(f) for f in (save_inputs, save_outputs)))
    check_files(saved)
    bundle = Path(bundle)
    manifest = read_manifest(bundle)
    record = choose_engine(
        bundle,
        manifest,
        backend=backend,
        device=device,
        resolution=resolution,
        frames=frames,
        dtype=dtype,
        provider=provider,
    )
    seeded = seeded_inputs(manifest.config, record.geometry, seed)
    given: Loop | Calls = Loop(seeded, steps)
    if inputs is None and outputs is not None:
        raise WanExportError("recorded outputs need the inputs of the same calls: pass both files")
    if inputs is not None:
        given = _read_given(Path(inputs), outputs, outputs_dtype, record, Loop(seeded, steps))
    peers = _open_peers(bundle, manifest, record, given, reference, model)
    started = time.perf_counter()
    opened_engine = open_engine(
        bundle, manifest, record, provider=provider, provider_options=provider_options
    )
    engine = Recorder(opened_engine)
    opened = time.perf_counter() - started
    kept: list[ComparedCall] | None = [] if saved.paths() else None
    rows, eager_seconds = Comparison(engine, peers, reference, progress, kept).rows(given)
    result: dict[str, Any] = {
        "engine": record.name,
        "reference": _describe(reference, given),
        "model": None if model is None else str(model),
        "inputs": f"seed {seed}" if inputs is None else str(inputs),
        "outputs": None if outputs is None else str(outputs),
        "passed": all(row["passed"] for row in rows),
        "steps": rows,
        "seconds": {
            "open": round(opened, 3),
            "engine_call": _median(engine.seconds),
            "reference_call": _median(eager_seconds),
        },
        "peak_rss_bytes": peak_rss(),
        "polygraphy": None,
        "warning": None,
    }
    if kept is not None:
        result["polygraphy"] = save_calls(
            saved,
            kept,
            bundle=bundle,
            manifest=manifest,
            denoiser=engine.denoiser,
            reference=result["reference"],
        )
    result["warning"] = _keep(bundle, record, given, result, report)
    return result


def _describe(reference: str, given: Loop | Calls) -> str:
    dtype = given.recorded_dtype
    return f"recorded ({reference}, {dtype})" if dtype else reference


def _read_given(
    path: Path, outputs: str | Path | None, outputs_dtype: str, record: EngineRecord, seeded: Loop
) -> Loop | Calls:
    """Inputs of a loop, or of calls with or without what was recorded for them."""
    if outputs_dtype not in DTYPES:
        raise WanExportError(
            f"unknown outputs dtype {outputs_dtype!r}: expected one of {', '.join(DTYPES)}"
        )
    if not is_of_calls(path):
        if outputs is not None:
            raise WanExportError(
                f"{path} has the inputs of a loop: recorded outputs need those of single calls, "
                f"with latent and timestep"
            )
        return Loop({"noise": seeded.inputs["noise"], **read_sample_inputs(path)}, seeded.steps)
    calls = Calls(read_calls(path, record.inputs))
    if outputs is None:
        return calls
    velocities = read_velocities(Path(outputs), len(calls.inputs), record.output)
    return replace(calls, velocities=velocities, recorded_dtype=outputs_dtype)


def _open_peers(
    bundle: Path,
    manifest: Manifest,
    record: EngineRecord,
    given: Loop | Calls,
    reference: str,
    model: str | Path | None,
) -> Peers:
    """The eager denoisers that this comparison takes, with tensors that were checked."""
    keys = needed_peers(reference, record.dtype, given.recorded_dtype)
    checkpoint = tensors_of_checkpoint(model, manifest) if model is not None else None
    tensors = tensors_of_bundle(bundle, manifest, record)
    if checkpoint is None or record.dtype == "fp32":
        return open_peers(manifest, record, checkpoint or tensors, keys, unrounded=None)
    keys |= {(reference, "fp32")}
    return open_peers(manifest, record, checkpoint, keys, unrounded=reference)


def _median(seconds: Sequence[float]) -> float | None:
    return round(statistics.median(seconds), 4) if seconds else None


def _keep(
    bundle: Path,
    engine: EngineRecord,
    given: Loop | Calls,
    result: Mapping[str, Any],
    report: str | Path | None,
) -> str | None:
    """Write the report, and beside the bundle's own one the note in the manifest.

    The verdict stands without either; what could not be written is returned, in one line.
    """
    lost = "the report was not saved"
    try:
        if report is None:
            lost = f"{lost}, nor the parity noted in the manifest"
            check_place(bundle)
            _save(own_folder(bundle, REPORTS), engine, given, result)
            lost = "the report is saved, but the parity was not noted in the manifest"
            _note_parity(bundle, engine, result)
        else:
            Path(report).mkdir(parents=True, exist_ok=True)
            _save(Path(report), engine, given, result)
    except (OSError, WanExportError) as error:
        return f"{lost}: {explain(error)}"
    return None


def _save(
    folder: Path, engine: EngineRecord, given: Loop | Calls, result: Mapping[str, Any]
) -> None:
    """Write the report, and the inputs of a loop that can be repeated with them."""
    remove_partials(folder)
    suffix = "" if result["reference"] == "graph" else f"-{result['reference'].split()[0]}"
    name = f"compare-{engine.name.replace('/', '-')}{suffix}"
    if isinstance(given, Loop):
        save_arrays(folder / f"{name}-inputs.safetensors", given.inputs)
    write_durably(folder / f"{name}.json", (json.dumps(result, indent=1) + "\n").encode())


def _note_parity(bundle: Path, engine: EngineRecord, result: Mapping[str, Any]) -> None:
    """Keep the worst step in the manifest, unless the engine was rebuilt meanwhile."""
    worst = max(result["steps"], key=_badness)
    names = ("error", "floor", "gate", "solver", "drift", "passed")
    parity = {name: worst[name] for name in names}
    parity |= {name: result[name] for name in ("reference", "model", "inputs")}
    with bundle_lock(bundle, waits=True):
        manifest = read_manifest(bundle)
        engines = tuple(
            replace(e, parity=parity) if (e.key, e.files) == (engine.key, engine.files) else e
            for e in manifest.engines
        )
        write_manifest(bundle, replace(manifest, engines=engines))


def _badness(row: Row) -> tuple[bool, float]:
    """What makes one step worse than another: that it failed, and how far."""
    ratio = inf if row["error"] is None else row["error"] / (row["gate"] or inf)
    return not row["passed"], ratio
