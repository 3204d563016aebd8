"""`wanexport compare`: an engine against a reference, step by step, on the same inputs.

The reference is the graph in eager fp32 with the bundle's weights, or diffusers' model, or recorded
velocities; the floor is the graph in the engine's own precision. Each step is teacher-forced:
engine and floor are given what the reference was given. Beside it stands the free-running drift,
where the engine follows its own latents.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

from wanexport.exporter.backends.backend import Progress
from wanexport.exporter.compare.peers import (
    Peers,
    Placed,
    check_implementation,
    needed_peers,
    open_peers,
    refuse_merged,
    tensors_of_bundle,
    tensors_of_checkpoint,
)
from wanexport.exporter.compare.polygraphy import SavedFiles, check_files, save_calls
from wanexport.exporter.compare.recorded import (
    Calls,
    Loop,
    read_calls,
    read_sample_inputs,
    read_velocities,
)
from wanexport.exporter.compare.report import Outcome, keep
from wanexport.exporter.compare.rows import ComparedCall, Comparison
from wanexport.exporter.compare.sessions import Recorder
from wanexport.exporter.model_source import check_low_noise
from wanexport.exporter.reference.inputs import seeded_inputs
from wanexport.runtime.bundle.manifest import EngineRecord, Manifest, read_manifest
from wanexport.runtime.dtypes import PRECISIONS
from wanexport.runtime.engines.choose import Choice, choose_engine
from wanexport.runtime.engines.engine import EngineKeywords, EngineOptions
from wanexport.runtime.errors import BadRequest, refuse_empty
from wanexport.runtime.load import find_weights, open_engine
from wanexport.runtime.machine.memory import peak_rss


@dataclass(frozen=True)
class CompareRequest:
    """What an engine is held against, and on which inputs.

    reference is `graph` or `diffusers`: whose fp32 forward with the engine's weights is right;
    model names the checkpoint to take its tensors from instead, or with low_noise the high-noise
    one of two. The loop has `steps` steps with the engine's solver and guidance; inputs is a
    safetensors file for it, as `run` takes it. In its place calls is such a file of single calls
    (see `recorded`), and outputs the velocities recorded for them, computed in outputs_dtype with
    the precision policy of reference.
    """

    model: str | Path | None = None
    low_noise: str | Path | None = None
    reference: str = "graph"
    inputs: Path | None = None
    calls: Path | None = None
    outputs: Path | None = None
    outputs_dtype: str = "fp32"
    steps: int = 4
    seed: int = 0


def compare(
    bundle: str | Path,
    *,
    model: str | Path | None = None,
    low_noise: str | Path | None = None,
    reference: str = "graph",
    inputs: str | Path | None = None,
    calls: str | Path | None = None,
    outputs: str | Path | None = None,
    outputs_dtype: str = "fp32",
    steps: int = 4,
    seed: int = 0,
    report: str | Path | None = None,
    save_inputs: str | Path | None = None,
    save_outputs: str | Path | None = None,
    progress: Progress = lambda stage, done, total: None,
    **options: Unpack[EngineKeywords],
) -> dict[str, Any]:
    """Compare one engine of a bundle with a reference; the result says whether it passed.

    model to seed are those of CompareRequest, options of `load`. The result is saved in report, by
    default the bundle's `reports/`. save_inputs and save_outputs are JSON files for polygraphy, of
    the calls that are compared; `polygraphy` in the result has the commands that read them.
    Raises WanExportError when no engine fits or cannot run here, or a file does not fit.
    """
    refuse_empty(bundle=bundle, model=model, inputs=inputs, calls=calls, outputs=outputs)
    refuse_empty(low_noise=low_noise, report=report)
    request = CompareRequest(
        model=model,
        low_noise=low_noise,
        reference=reference,
        inputs=_path(inputs),
        calls=_path(calls),
        outputs=_path(outputs),
        outputs_dtype=outputs_dtype,
        steps=steps,
        seed=seed,
    )
    _check_request(request)
    saved = SavedFiles(_path(save_inputs), _path(save_outputs))
    check_files(saved)
    outcome = _compare(Path(bundle), request, saved, EngineOptions(**options), progress)
    outcome.result["warning"] = keep(Path(bundle), outcome, _path(report))
    return outcome.result


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)


def _check_request(request: CompareRequest) -> None:
    """Raise BadRequest for what needs no bundle to be seen as wrong."""
    check_low_noise(request.model, request.low_noise)
    check_implementation(request.reference)
    if request.inputs is not None and request.calls is not None:
        raise BadRequest("inputs are of a loop, calls are single ones: pass one of the two")
    if request.outputs is not None and request.calls is None:
        raise BadRequest(
            "outputs are of recorded calls: pass the file of these calls too (--calls)"
        )
    if request.outputs_dtype not in PRECISIONS:
        raise BadRequest(
            f"unknown outputs dtype {request.outputs_dtype!r}: expected one of "
            f"{', '.join(PRECISIONS)}"
        )


def _compare(
    bundle: Path,
    request: CompareRequest,
    saved: SavedFiles,
    options: EngineOptions,
    progress: Progress,
) -> Outcome:
    """Open both sides and compare them; nothing is written but what polygraphy reads."""
    manifest = read_manifest(bundle)
    choice = choose_engine(bundle, manifest, options)
    given = _inputs(request, manifest, choice.record)
    peers = _open_peers(bundle, manifest, choice, options, request, given)
    started = time.perf_counter()
    engine = Recorder(open_engine(bundle, manifest, choice, options))
    opened = time.perf_counter() - started
    kept: list[ComparedCall] | None = [] if saved.paths() else None
    comparison = Comparison(engine, peers, request.reference, progress, kept)
    rows, eager_seconds = comparison.rows(given)
    result = _described(request, options, choice.record, given) | {
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
        files = find_weights(bundle, choice.record, options.weights, manifest).files
        result["polygraphy"] = save_calls(
            saved, kept, bundle, engine.denoiser, files, result["reference"]
        )
    return Outcome(choice.record, given, result)


def _described(
    request: CompareRequest, options: EngineOptions, record: EngineRecord, given: Loop | Calls
) -> dict[str, Any]:
    """What the result says of both sides and their inputs."""
    dtype, reference = given.recorded_dtype, request.reference
    file = request.inputs or request.calls
    return {
        "engine": record.name,
        "weights": None if options.weights is None else str(options.weights),
        "reference": f"recorded ({reference}, {dtype})" if dtype else reference,
        "model": None if request.model is None else str(request.model),
        "inputs": f"seed {request.seed}" if file is None else str(file),
        "outputs": None if request.outputs is None else str(request.outputs),
    }


def _inputs(request: CompareRequest, manifest: Manifest, record: EngineRecord) -> Loop | Calls:
    """Inputs of a loop, or of calls with or without what was recorded for them."""
    if request.calls is not None:
        return _calls(request.calls, request, record)
    seeded = seeded_inputs(manifest.config, record.geometry, request.seed)
    if request.inputs is None:
        return Loop(seeded, request.steps)
    own = read_sample_inputs(request.inputs, record.inputs)
    return Loop({"noise": seeded["noise"], **own}, request.steps)


def _calls(path: Path, request: CompareRequest, record: EngineRecord) -> Calls:
    """Single calls, with what was recorded for them where that was given."""
    calls = Calls(read_calls(path, record.inputs))
    if request.outputs is None:
        return calls
    velocities = read_velocities(request.outputs, len(calls.inputs), record.output)
    return replace(calls, velocities=velocities, recorded_dtype=request.outputs_dtype)


def _open_peers(
    bundle: Path,
    manifest: Manifest,
    choice: Choice,
    options: EngineOptions,
    request: CompareRequest,
    given: Loop | Calls,
) -> Peers:
    """The eager denoisers that this comparison takes, with tensors that were checked."""
    record = choice.record
    keys = needed_peers(request.reference, record.dtype, given.recorded_dtype)
    tensors = tensors_of_bundle(bundle, manifest, record, options.weights)
    unrounded = None
    if request.model is not None:
        refuse_merged(manifest, record, options.weights)
        tensors = tensors_of_checkpoint(request.model, request.low_noise, manifest)
        unrounded = None if record.dtype == "fp32" else request.reference
        keys |= {(request.reference, "fp32")} if unrounded else set()
    placed = Placed(manifest, record, choice.device, tensors)
    return open_peers(placed, keys, unrounded=unrounded)


def _median(seconds: Sequence[float]) -> float | None:
    return round(statistics.median(seconds), 4) if seconds else None
