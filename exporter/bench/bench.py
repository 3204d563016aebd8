"""`wanexport bench`: the speed of an engine and of what else runs the model, on the same inputs.

Every arm gets the same weights file and inputs, in a fresh process with empty compilation caches,
so that its cold start is what a user would wait for; the weights are in the page cache. The floor
is the time of the forward's FLOPs at the rate of the best matrix product of the same run.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

from wanexport.exporter.backends.backend import Progress
from wanexport.exporter.bench.arms import (
    ARMS,
    Job,
    choose_arms,
    engine_of,
    kernel_of,
    recorded_kernel,
)
from wanexport.exporter.bench.report import add_differences, row, save
from wanexport.exporter.bench.subject import Subject, choose_subject, first_job, read_files
from wanexport.exporter.bundle.place import REPORTS
from wanexport.exporter.child.child import run_process
from wanexport.exporter.reference.inputs import forward_inputs
from wanexport.graphs.signature import forward_flops
from wanexport.runtime.bundle.manifest import Manifest
from wanexport.runtime.bundle.tensorfile import load_arrays, save_arrays
from wanexport.runtime.engines.engine import EngineKeywords, EngineOptions
from wanexport.runtime.errors import BadRequest, EngineFailure, WanExportError, refuse_empty
from wanexport.runtime.machine.temporary import check_temporary_folder, marked_folder

LEAST_ROUNDS = 5
BUDGET = 540.0  # seconds
_SEED = 0


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
    rounds: int = LEAST_ROUNDS,
    budget: float = BUDGET,
    profile: bool = False,
    report: str | Path | None = None,
    progress: Progress = lambda stage, done, total: None,
    **options: Unpack[EngineKeywords],
) -> dict[str, Any]:
    """Measure the arms in `against`, by default those that apply to the engine's device.

    The options choose an engine as `load` does, and with it shape, precision, weights and device of
    all arms; how to open it is for the arms whose engines have such an option. Of two experts the
    high-noise one is measured. Each arm has `rounds` timed forwards; profile adds host waits and
    the GPU's busy share. budget is in seconds: an arm that cannot fit what is left of it is in
    `skipped`, one that failed in `failed`, each with the reason. Result and plot are saved in
    report, by default the bundle's `reports/`.
    Raises WanExportError when no engine fits, an arm is unknown or cannot run here, or none ran.
    """
    started, asked = time.monotonic(), EngineOptions(**options)
    _check_request(rounds, asked)
    check_temporary_folder()
    subject = choose_subject(Path(bundle).resolve(), asked)
    with marked_folder("wanexport-bench-") as folder:
        job = first_job(subject, folder, rounds, profile)
        arms = choose_arms(subject.manifest, job, against, asked.backend)
        if any(ARMS[arm].compiles for arm in arms):
            check_temporary_folder(compiles=True)
        result = _measure_all(subject, arms, _Session(job, folder, started, budget), progress)
    result["seconds"] = time.monotonic() - started
    folder = subject.bundle / REPORTS if report is None else Path(report)
    result["warning"] = save(result, folder, is_own=report is None)
    return result


def _check_request(rounds: int, asked: EngineOptions) -> None:
    """Raise BadRequest for what no bundle makes sense of."""
    refuse_empty(weights=asked.weights)
    if rounds < LEAST_ROUNDS:
        raise BadRequest(f"{rounds} rounds make no median: expected {LEAST_ROUNDS} or more")
    if asked.offload:
        raise BadRequest("bench measures one expert, offload swaps two: leave it out")


def _measure_all(
    subject: Subject, arms: Sequence[str], session: _Session, progress: Progress
) -> dict[str, Any]:
    """The figures of the machine and the arms. Raises EngineFailure when none ran."""
    config, geometry = subject.manifest.config, subject.record.geometry
    inputs = forward_inputs(config, geometry, subject.timestep, _SEED)
    save_arrays(Path(session.job.inputs), inputs)
    progress("reading the weights", 0, 0)
    read_files(subject)
    progress("measuring the machine", 0, 0)
    result = _describe(subject, session)
    _measure_arms(result, arms, subject.manifest, session, progress)
    if not result["arms"]:
        reasons = result["failed"] | result["skipped"]
        raise EngineFailure("; ".join(f"{arm}: {reason}" for arm, reason in reasons.items()))
    return result


def _describe(subject: Subject, session: _Session) -> dict[str, Any]:
    """What the arms have in common: the machine's peak, and the floor that follows from it."""
    try:
        machine = session.child()
    except _OverBudget as error:
        raise BadRequest(
            f"a budget of {session.budget:g} s does not even do for the machine's peak: raise it"
        ) from error
    flops = forward_flops(subject.manifest.config, subject.record.geometry)
    weights = subject.options.weights
    return {
        "engine": subject.record.name,
        "model": subject.manifest.model,
        "expert": subject.expert,
        "weights": None if weights is None else str(weights),
        "tokens": subject.record.geometry.num_tokens,
        "device": session.job.device,
        **machine,
        "flops_per_forward": flops,
        "floor_seconds": flops / machine["peak"],
        "rounds": session.job.rounds,
        "budget_seconds": session.budget,
        "timestep": subject.timestep,
        "seed": _SEED,
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
        left, code = max(0.0, session.left), ARMS[arm].code
        least = slowest.get(code, floor)
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
            slowest[code] = max(least, left - session.left)
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
    kernel = kernel_of(ARMS[arm], job)
    line = row(figures, result["flops_per_forward"], result["floor_seconds"])
    if engine:
        kernel = kernel or recorded_kernel(engine)
        line["compile_seconds"] = engine.build.get("seconds")
    elif ARMS[arm].compiles and line["compile_seconds"] is None:  # within the first call
        first_call = figures["cold_start"]["first_call"]
        line["compile_seconds"] = max(0.0, first_call - line["median"])
    return {"arm": arm, "engine": engine and engine.name, "attention": kernel, **line}
