"""`wanexport bench`: the speed of an engine and of what else runs the model, on the same inputs.

Every arm gets the same weights file and inputs, in a fresh process with empty compilation caches,
so that its cold start is what a user would wait for; the weights are in the page cache. The floor
is the time of the forward's FLOPs at the rate of the best matrix product of the same run.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from wanexport.exporter.backends.backend import Progress
from wanexport.exporter.bench.arms import LEAST_ROUNDS, Arm, Job, find_arms, kernel_shown
from wanexport.exporter.bench.report import add_differences, row, save
from wanexport.exporter.bench.subject import (
    Subject,
    arms_that_apply,
    check_arms,
    choose_subject,
    engine_of,
    first_job,
    read_files,
)
from wanexport.exporter.bundle.place import REPORTS
from wanexport.exporter.child.child import run_process
from wanexport.exporter.reference.inputs import forward_inputs
from wanexport.graphs.signature import forward_flops
from wanexport.runtime.bundle.manifest import read_manifest
from wanexport.runtime.bundle.tensorfile import load_arrays, save_arrays
from wanexport.runtime.engines.engine import EngineKeywords, EngineOptions
from wanexport.runtime.errors import BadRequest, EngineFailure, WanExportError, refuse_empty
from wanexport.runtime.family import FAMILIES
from wanexport.runtime.machine.temporary import check_temporary_folder, marked_folder

_LIMIT = 1800.0  # seconds after which an arm is given up, one that compiles too
_SEED = 0


def _untold(stage: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def bench(
    bundle: str | Path,
    *,
    arms: Sequence[str] | None = None,
    rounds: int = LEAST_ROUNDS,
    profile: bool = False,
    report: str | Path | None = None,
    progress: Progress = _untold,
    **options: Unpack[EngineKeywords],
) -> dict[str, Any]:
    """Measure arms, by default those that apply to the engine that runs best here.

    arms are names of backends, `graph`, `diffusers` and `compile`: diffusers with torch.compile.
    The options choose an engine as `load` does, and with it shape, precision, weights and device of
    all arms; how to open it is for the arms whose engines have such an option. Of two experts the
    high-noise one is measured. Each arm has `rounds` timed forwards; profile adds host waits and
    the GPU's busy share. An arm that failed is in `failed`, with the reason. Result and plot are
    saved in report, by default the bundle's `reports/`.
    Raises WanExportError when the model is causal, no engine fits, an arm is unknown or cannot run
    here, or none ran.
    """
    started, asked = time.monotonic(), EngineOptions(**options)
    _check_request(rounds, asked)
    named = find_arms(arms or ())
    path = Path(bundle).resolve()
    _refuse_causal(path)
    subject = choose_subject(path, asked, named)
    chosen = named or arms_that_apply(subject)
    result = measure(subject, chosen, rounds=rounds, profile=profile, progress=progress)
    result["seconds"] = time.monotonic() - started
    folder = subject.bundle / REPORTS if report is None else Path(report)
    result["warning"] = save(result, folder, is_own=report is None)
    return result


def _refuse_causal(bundle: Path) -> None:
    """Raise BadRequest for a causal model, whose forward takes longer the more is kept."""
    family = FAMILIES.get(read_manifest(bundle).config.family)
    if family is not None and family.is_causal:
        raise BadRequest(
            f"{bundle} is of a causal model, which makes a video chunk by chunk, and bench "
            f"measures whole ones: wanexport stream says how long the chunks take"
        )


def _check_request(rounds: int, asked: EngineOptions) -> None:
    """Raise BadRequest for what no bundle makes sense of."""
    refuse_empty(weights=asked.weights)
    if rounds < LEAST_ROUNDS:
        raise BadRequest(f"{rounds} rounds make no median: expected {LEAST_ROUNDS} or more")
    if asked.offload == "experts":
        raise BadRequest("bench measures one expert, offload experts swaps two: leave it out")
    if asked.backend:
        raise BadRequest(f"bench takes no backend: name it among the arms, as {asked.backend}")


def measure(
    subject: Subject,
    arms: Sequence[Arm],
    *,
    rounds: int = LEAST_ROUNDS,
    profile: bool = False,
    progress: Progress = _untold,
) -> dict[str, Any]:
    """The figures of the machine and of each arm, every one from a process of its own.

    Raises BadRequest, before any runs, when an arm cannot run here, and EngineFailure when none
    ran.
    """
    check_temporary_folder(compiles=any(arm.compiles for arm in arms))
    check_arms(arms, subject)
    with marked_folder("wanexport-bench-") as folder:
        job = first_job(subject, folder, rounds, profile)
        config, geometry = subject.manifest.config, subject.record.geometry
        save_arrays(Path(job.inputs), forward_inputs(config, geometry, subject.timestep, _SEED))
        progress("reading the weights", 0, 0)
        read_files(subject)
        progress("measuring the machine", 0, 0)
        result = _describe(subject, job, run_job(job, folder))
        velocities: dict[str, Any] = {}
        for number, arm in enumerate(arms):
            progress(f"measuring {arm.name}", number, len(arms))
            try:
                figures = run_job(replace(job, arm=arm), folder)
            except WanExportError as error:
                result["failed"][arm.name] = str(error)
                continue
            result["arms"].append(_line(arm, figures, result, subject))
            velocities[arm.name] = load_arrays(Path(job.velocity))["velocity"]
    add_differences(result, velocities)
    if not velocities:
        raise EngineFailure("; ".join(f"{arm}: {why}" for arm, why in result["failed"].items()))
    return result


def run_job(job: Job, folder: Path) -> dict[str, Any]:
    """Do a job in a fresh process, with empty compilation caches.

    Raises WanExportError with the process's last words, and EngineFailure when it takes too long.
    """
    job = replace(job, spawned=time.time())
    try:
        return run_process("bench.process", job, folder, timeout=_LIMIT)
    except TimeoutError as error:
        raise EngineFailure(f"it was stopped after {_LIMIT:g} s") from error


def _describe(subject: Subject, job: Job, machine: dict[str, Any]) -> dict[str, Any]:
    """What the arms have in common: the machine's peak, and the floor that follows from it."""
    flops = forward_flops(subject.manifest.config, subject.record.geometry)
    weights = subject.options.weights
    return {
        "engine": subject.record.name,
        "model": subject.manifest.model,
        "expert": subject.expert,
        "weights": None if weights is None else str(weights),
        "tokens": subject.record.geometry.num_tokens,
        "device": job.device,
        **machine,
        "flops_per_forward": flops,
        "floor_seconds": flops / machine["peak"],
        "rounds": job.rounds,
        "timestep": subject.timestep,
        "seed": _SEED,
        "arms": [],
        "failed": {},
    }


def _line(
    arm: Arm, figures: dict[str, Any], result: dict[str, Any], subject: Subject
) -> dict[str, Any]:
    """An arm's line in the result."""
    engine = engine_of(arm, subject)
    line = row(figures, result["flops_per_forward"], result["floor_seconds"])
    if engine:
        line["compile_seconds"] = engine.build.get("seconds")
    elif arm.compiles:  # within the first call
        line["compile_seconds"] = max(0.0, figures["cold_start"]["first_call"] - line["median"])
    attention = kernel_shown(arm, subject.options, engine)
    return {"arm": arm.name, "engine": engine and engine.name, "attention": attention, **line}
