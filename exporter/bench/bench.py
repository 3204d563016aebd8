"""`wanexport bench`: the speed of an engine and of what else runs the model, on the same inputs.

Every arm gets the same weights file and inputs, in a fresh process with empty compilation caches,
so that its cold start is what a user would wait for; the weights are in the page cache. The floor
is the time of the forward's FLOPs at the rate of the best matrix product of the same run.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from wanexport.exporter.backends.backend import Progress
from wanexport.exporter.bench.arms import (
    ARMS,
    Job,
    choose_arms,
    engine_of,
    kernel_of,
    with_measured_expert,
)
from wanexport.exporter.bench.process import PEAK
from wanexport.exporter.bench.report import add_differences, row, save
from wanexport.exporter.child.child import run_process
from wanexport.exporter.reference.inputs import forward_inputs
from wanexport.graphs.signature import forward_flops
from wanexport.runtime.bundle.check import check_size
from wanexport.runtime.bundle.manifest import EngineRecord, Manifest, read_manifest
from wanexport.runtime.bundle.tensorfile import load_arrays, save_arrays
from wanexport.runtime.engines.choose import choose_engine
from wanexport.runtime.errors import WanExportError
from wanexport.runtime.machine.temporary import check_temporary_folder, marked_folder
from wanexport.runtime.solvers import NUM_TRAIN_TIMESTEPS

LEAST_ROUNDS = 5
BUDGET = 540.0  # seconds
_SEED = 0
_TIMESTEP = 812.0
_HIGH_NOISE_TIMESTEP = 950.0
_CHUNK = 1 << 24


class _OverBudget(Exception):
    """A process was stopped because the time was up."""


@dataclass(frozen=True)
class _Session:
    """What the arms of one run share: the job but for its arm, a folder, and the time."""

    job: Job
    folder: Path
    started: float  # of time.monotonic, which counts seconds
    budget: float

    @property
    def left(self) -> float:
        return self.started + self.budget - time.monotonic()

    def child(self, **changes: Any) -> dict[str, Any]:
        """Run a job in a fresh process, with empty compilation caches.

        Raises _OverBudget when the time is up, and WanExportError with the child's last words.
        """
        if self.left <= 0:
            raise _OverBudget
        job = replace(self.job, **changes, spawned=time.time())
        try:
            return run_process("bench.process", job, self.folder, timeout=self.left)
        except TimeoutError as error:
            raise _OverBudget from error


def bench(
    bundle: str | Path,
    *,
    against: Sequence[str] | None = None,
    backend: str | None = None,
    device: str | None = None,
    resolution: str | None = None,
    frames: int | None = None,
    dtype: str | None = None,
    provider: str | None = None,
    provider_options: Mapping[str, str] | None = None,
    rounds: int = LEAST_ROUNDS,
    budget: float = BUDGET,
    profile: bool = False,
    report: str | Path | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Measure the arms in `against`, by default those that apply to the engine's device.

    The options choose an engine as `load` does, provider and its options that of ONNX Runtime in
    the onnx arm, and with it shape, precision and device of all
    arms. Of two experts the high-noise one is measured. Each arm has `rounds` timed forwards;
    profile adds host waits and the GPU's busy share. budget is in seconds: an arm that cannot fit
    what is left of it is in `skipped`, one that failed in `failed`, each with the reason. Result
    and plot are saved in report, by default the bundle's `reports/`.
    Raises WanExportError when no engine fits, an arm is unknown or cannot run here, or none ran.
    """
    started = time.monotonic()
    if rounds < LEAST_ROUNDS:
        raise WanExportError(f"{rounds} rounds make no median: expected {LEAST_ROUNDS} or more")
    check_temporary_folder()
    bundle = Path(bundle).resolve()
    manifest = with_measured_expert(read_manifest(bundle))
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
    with marked_folder("wanexport-bench-") as folder:
        job = replace(
            _job(bundle, record, folder, rounds, profile),
            provider=provider,
            provider_options=dict(provider_options or {}),
        )
        arms = choose_arms(manifest, record, job, against, backend)
        if any(ARMS[arm].runs == "aoti" or ARMS[arm].compiles for arm in arms):
            check_temporary_folder(compiles=True)
        session = _Session(job, folder, started, budget)
        inputs = _write_inputs(manifest, record, Path(job.inputs))
        progress("reading the weights", 0, 0)
        _read_files(bundle, manifest, record)
        progress("measuring the machine", 0, 0)
        result = _describe(manifest, record, session) | inputs
        _measure_arms(result, arms, manifest, session, progress)
    result["seconds"] = time.monotonic() - started
    if not result["arms"]:
        reasons = result["failed"] | result["skipped"]
        raise WanExportError("; ".join(f"{arm}: {reason}" for arm, reason in reasons.items()))
    folder = bundle / "reports" if report is None else Path(report)
    result["warning"] = save(result, folder, is_own=report is None)
    return result


def _job(bundle: Path, record: EngineRecord, folder: Path, rounds: int, profile: bool) -> Job:
    return Job(
        arm=PEAK,
        bundle=str(bundle),
        device=record.target["device"],
        dtype=record.dtype,
        geometry=asdict(record.geometry),
        inputs=str(folder / "inputs.safetensors"),
        velocity=str(folder / "velocity.safetensors"),
        package=str(folder / "block.pt2"),
        rounds=rounds,
        profile=profile,
        spawned=0.0,
    )


def _write_inputs(manifest: Manifest, record: EngineRecord, path: Path) -> dict[str, Any]:
    """Write what every arm is given, and return how it came about."""
    timestep = _TIMESTEP
    if record.sampling.boundary is not None:
        timestep = max(_HIGH_NOISE_TIMESTEP, record.sampling.boundary * NUM_TRAIN_TIMESTEPS)
    config = manifest.config
    save_arrays(path, forward_inputs(config, record.geometry, timestep, _SEED))
    return {"timestep": timestep, "seed": _SEED}


def _read_files(bundle: Path, manifest: Manifest, record: EngineRecord) -> None:
    """Have the page cache hold what the arms read, lest the first of them pay for the disk."""
    weights = [w.file for w in manifest.weights_of(record.dtype)]
    buffer = bytearray(_CHUNK)
    for file in (*weights, *record.files.values()):
        with check_size(bundle, file).path.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def _describe(manifest: Manifest, record: EngineRecord, session: _Session) -> dict[str, Any]:
    """What the arms have in common: the machine's peak, and the floor that follows from it."""
    try:
        machine = session.child()
    except _OverBudget as error:
        raise WanExportError(
            f"a budget of {session.budget:g} s does not even do for the machine's peak: raise it"
        ) from error
    flops = forward_flops(manifest.config, record.geometry)
    return {
        "engine": record.name,
        "model": manifest.model,
        "expert": "high_noise" if manifest.experts else None,
        "tokens": record.geometry.num_tokens,
        "device": session.job.device,
        **machine,
        "flops_per_forward": flops,
        "floor_seconds": flops / machine["peak"],
        "rounds": session.job.rounds,
        "budget_seconds": session.budget,
        "arms": [],
        "failed": {},
        "skipped": {},
    }


def _measure_arms(
    result: dict[str, Any],
    arms: Sequence[str],
    manifest: Manifest,
    session: _Session,
    progress: Progress,
) -> None:
    """Add each arm's row, or the reason why there is none."""
    velocities: dict[str, Any] = {}
    # No arm is faster than the floor, nor, by much, than the same code with another kernel was.
    floor = (2 + session.job.rounds) * result["floor_seconds"]
    slowest: dict[str, float] = {}
    for number, arm in enumerate(arms):
        progress(f"measuring {arm}", number, len(arms))
        left, runs = max(0.0, session.left), ARMS[arm].runs
        least = slowest.get(runs, floor)
        if left < least:
            result["skipped"][arm] = f"takes some {least:.0f} s, the budget has {left:.0f} s left"
            continue
        try:
            figures = _measure(arm, session)
        except _OverBudget:
            result["skipped"][arm] = f"stopped after {left:.0f} s, when the budget was spent"
            continue
        except WanExportError as error:
            result["failed"][arm] = str(error)
            continue
        if ARMS[arm].compiles is None:
            slowest[runs] = max(least, left - session.left)
        result["arms"].append(_row(arm, figures, result, manifest, session.job))
        velocities[arm] = load_arrays(Path(session.job.velocity))["velocity"]
    add_differences(result, velocities)


def _measure(arm: str, session: _Session) -> dict[str, Any]:
    """The figures of an arm; a regional package is compiled in a process before."""
    regional = ARMS[arm].compiles == "regional"
    compiled = session.child(arm=arm, compile_only=True) if regional else {}
    return session.child(arm=arm) | compiled


def _row(
    arm: str, figures: dict[str, Any], result: dict[str, Any], manifest: Manifest, job: Job
) -> dict[str, Any]:
    """The arm's line in the result."""
    engine = engine_of(arm, manifest, job)
    kernel = kernel_of(ARMS[arm], job.device, job.dtype)
    line = row(figures, result["flops_per_forward"], result["floor_seconds"])
    if engine:
        kernel = kernel or engine.attention.get(str(engine.geometry.num_tokens))
        line["compile_seconds"] = engine.build.get("seconds")
    elif ARMS[arm].compiles and line["compile_seconds"] is None:  # within the first call
        first_call = figures["cold_start"]["first_call"]
        line["compile_seconds"] = max(0.0, first_call - line["median"])
    return {"arm": arm, "attention": kernel, **line}
