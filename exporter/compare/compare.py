"""`wanexport compare`: an engine against a reference, step by step, on the same inputs.

The reference is the graph in eager fp32 with the bundle's weights, or diffusers' model, or recorded
velocities; the floor is the graph in the engine's own precision. Each step is teacher-forced:
engine and floor are given what the reference was given. Beside it stands the free-running drift,
where the engine follows its own latents.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from wanexport.exporter.backends.backend import Progress
from wanexport.exporter.compare.against import note_on, open_against
from wanexport.exporter.compare.locate import Sides, check_sides, locate
from wanexport.exporter.compare.peers import (
    EXACT,
    Peers,
    Placed,
    generator_of,
    needed_peers,
    open_peers,
    refuse_merged,
    tensors_of_bundle,
    tensors_of_checkpoint,
)
from wanexport.exporter.compare.plot import check_plot, save_plot
from wanexport.exporter.compare.polygraphy import SavedFiles, check_files, save_calls
from wanexport.exporter.compare.recorded import (
    Calls,
    Loop,
    read_calls,
    read_sample_inputs,
    read_velocities,
)
from wanexport.exporter.compare.report import Outcome, keep
from wanexport.exporter.compare.request import CompareRequest, check_request
from wanexport.exporter.compare.rows import ComparedCall, Comparison
from wanexport.exporter.compare.sessions import Recorder
from wanexport.exporter.compare.streams import OF_STREAMS, check_streamed, stream_rows
from wanexport.exporter.reference.inputs import seeded_inputs
from wanexport.runtime.bundle.manifest import EngineRecord, Manifest, read_manifest
from wanexport.runtime.bundle.signature import program_of
from wanexport.runtime.denoiser import Denoiser
from wanexport.runtime.engines.choose import Choice, choose_engine
from wanexport.runtime.engines.engine import EngineKeywords, EngineOptions
from wanexport.runtime.errors import refuse_empty
from wanexport.runtime.load import find_weights, open_engine
from wanexport.runtime.machine.memory import peak_rss
from wanexport.runtime.wan_config import EXPERTS


def compare(
    bundle: str | Path,
    *,
    model: str | Path | None = None,
    low_noise: str | Path | None = None,
    ema: bool | None = None,
    reference: str = "graph",
    inputs: str | Path | None = None,
    calls: str | Path | None = None,
    outputs: str | Path | None = None,
    outputs_dtype: str = "fp32",
    steps: int = 4,
    seed: int = 0,
    against: str | None = None,
    bisect: bool = False,
    chunks: int | None = None,
    window: int | None = None,
    sink: int = 0,
    max_attention: int | None = None,
    plot: str | Path | None = None,
    report: str | Path | None = None,
    save_inputs: str | Path | None = None,
    save_outputs: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress = lambda stage, done, total: None,
    **options: Unpack[EngineKeywords],
) -> dict[str, Any]:
    """Compare one engine of a bundle with a reference; the result says whether it passed.

    model to max_attention are those of CompareRequest, options of `load`. The result is saved in
    report, by default the bundle's `reports/`, and its curves in the SVG file plot. save_inputs and
    save_outputs are JSON files for polygraphy, of the calls that are compared; `polygraphy` in the
    result has the commands that read them. These three replace a file that is there only with
    overwrite.
    Raises WanExportError when no engine fits or cannot run here, or a file does not fit.
    """
    refuse_empty(bundle=bundle, model=model, inputs=inputs, calls=calls, outputs=outputs)
    refuse_empty(low_noise=low_noise, report=report, plot=plot)
    request = CompareRequest(
        model=model,
        low_noise=low_noise,
        ema=ema,
        reference=reference,
        inputs=_path(inputs),
        calls=_path(calls),
        outputs=_path(outputs),
        outputs_dtype=outputs_dtype,
        steps=steps,
        seed=seed,
        against=against,
        bisect=bisect,
        chunks=chunks,
        window=window,
        sink=sink,
        max_attention=max_attention,
    )
    check_request(request)
    saved = SavedFiles(_path(save_inputs), _path(save_outputs), overwrite)
    drawing = _path(plot)
    check_files(saved)
    check_plot(drawing, overwrite=overwrite)
    outcome = _compare(Path(bundle), request, saved, EngineOptions(**options), progress)
    if drawing is not None:
        save_plot(drawing, outcome.result)
    outcome.result["warning"] = keep(Path(bundle), outcome, _path(report))
    return outcome.result


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)


def _compare(
    bundle: Path,
    request: CompareRequest,
    saved: SavedFiles,
    options: EngineOptions,
    progress: Progress,
) -> Outcome:
    """Open both sides and compare them; nothing is written but what polygraphy reads."""
    manifest = read_manifest(bundle)
    choice = _choose(bundle, manifest, options, saved)
    check_streamed(request, choice.record.geometry, bool(saved.paths()))
    given = _inputs(request, manifest, choice.record)
    peers = _open_peers(bundle, manifest, choice, options, request, given)
    started = time.perf_counter()
    engine = Recorder(open_engine(bundle, manifest, choice, options))
    opened = time.perf_counter() - started
    if choice.record.geometry.chunk:
        return _compare_stream(engine.denoiser, peers, given, request, options, opened, progress)
    files = find_weights(bundle, choice.record, options.weights, manifest).files
    program = program_of(manifest.config, choice.record.geometry)
    sides = Sides(engine.denoiser, program, files, peers, request.reference)
    if request.bisect:
        check_sides(sides)
    kept: list[ComparedCall] | None = [] if saved.paths() else None
    compared = Comparison(engine, peers, request.reference, progress, kept).rows(given)
    found = locate(sides, compared, progress=progress) if request.bisect else None
    result = _described(request, options, choice.record, given, peers) | {
        "passed": compared.passed,
        "steps": compared.rows,
        "bisect": found,
        **_cost(opened, engine.seconds, compared.reference_seconds),
        "polygraphy": None,
        "stream": None,
        "warning": None,
    }
    if kept is not None:
        told = save_calls(saved, kept, bundle, engine.denoiser, files, result["reference"])
        result["polygraphy"] = told
    return Outcome(choice.record, given, result)


def _choose(bundle: Path, manifest: Manifest, options: EngineOptions, saved: SavedFiles) -> Choice:
    """The engine, whose experts' files can be written too."""
    choice = choose_engine(bundle, manifest, options)
    if choice.record.sampling.boundary is not None:
        check_files(saved, EXPERTS)
    return choice


def _compare_stream(
    engine: Denoiser,
    peers: Peers,
    given: Loop | Calls,
    request: CompareRequest,
    options: EngineOptions,
    opened: float,
    progress: Progress,
) -> Outcome:
    """A causal engine against the graph."""
    assert isinstance(given, Loop)
    compared = stream_rows(engine, peers, given, request, progress)
    result = _described(request, options, engine.record, given, peers) | {
        "passed": compared.passed,
        "steps": compared.rows,
        "bisect": None,
        **_cost(opened, compared.seconds, compared.reference_seconds),
        "polygraphy": None,
        "stream": {name: getattr(request, name) for name in OF_STREAMS},
        "warning": None,
    }
    return Outcome(engine.record, given, result)


def _cost(opened: float, engine: Sequence[float], reference: Sequence[float]) -> dict[str, Any]:
    return {
        "seconds": {
            "open": round(opened, 3),
            "engine_call": _median(engine),
            "reference_call": _median(reference),
        },
        "peak_rss_bytes": peak_rss(),
    }


def _described(
    request: CompareRequest,
    options: EngineOptions,
    record: EngineRecord,
    given: Loop | Calls,
    peers: Peers,
) -> dict[str, Any]:
    """What the result says of both sides and their inputs."""
    dtype, reference = given.recorded_dtype, request.reference
    file = request.inputs or request.calls
    if peers.other is not None:
        reference = peers.other.denoiser.record.name
    return {
        "engine": record.name,
        "weights": None if options.weights is None else str(options.weights),
        "reference": f"recorded ({reference}, {dtype})" if dtype else reference,
        "note": None if peers.other is None else note_on(record, peers.other.denoiser.record),
        "model": None if request.model is None else str(request.model),
        "low_noise": None if request.low_noise is None else str(request.low_noise),
        "ema": request.ema,
        "inputs": f"seed {request.seed}" if file is None else str(file),
        "outputs": None if request.outputs is None else str(request.outputs),
    }


def _inputs(request: CompareRequest, manifest: Manifest, record: EngineRecord) -> Loop | Calls:
    """Inputs of a loop, or of calls with or without what was recorded for them."""
    if request.calls is not None:
        return _calls(request.calls, request, record)
    seeded = seeded_inputs(manifest.config, record.geometry, request.seed)
    if record.geometry.chunk:
        return _of_stream(seeded["text"], request, record)
    if request.inputs is None:
        return Loop(seeded, request.steps)
    own = read_sample_inputs(request.inputs, record.inputs)
    return Loop({"noise": seeded["noise"], **own}, request.steps)


def _of_stream(text: Any, request: CompareRequest, record: EngineRecord) -> Loop:
    """The text of a stream, and its noise where a file has some."""
    if request.inputs is None:
        return Loop({"text": text}, request.steps)
    own = read_sample_inputs(request.inputs, record.inputs)
    return Loop({name: own[name] for name in ("text", "noise") if name in own}, request.steps)


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
    if request.against is not None:
        return open_against(
            bundle, manifest, choice, request.against, options, exact=request.bisect
        )
    keys = needed_peers(request.reference, record.dtype, given.recorded_dtype)
    keys |= {EXACT} if request.bisect else set()
    tensors = tensors_of_bundle(bundle, manifest, record, options.weights)
    unrounded = None
    if request.model is not None:
        refuse_merged(manifest, record, options.weights)
        tensors = tensors_of_checkpoint(
            request.model,
            request.low_noise,
            request.ema,
            manifest,
            generator_of(manifest, record, options.weights),
        )
        unrounded = None if record.dtype == "fp32" else request.reference
        keys |= {(request.reference, "fp32")} if unrounded else set()
    placed = Placed(manifest, record, choice.device, tensors)
    return open_peers(placed, keys, unrounded=unrounded)


def _median(seconds: Sequence[float]) -> float | None:
    return round(statistics.median(seconds), 4) if seconds else None
