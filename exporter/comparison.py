"""The figures of `compare`: the engine's calls, loop and solver against the reference's."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import isfinite, nan
from typing import Any

import numpy as np

from wanexport.exporter.build import Progress
from wanexport.exporter.parity import FP32_GATE, Difference, Parity, difference, relative_l2
from wanexport.exporter.peers import Peers
from wanexport.exporter.solver_oracle import exact_latents, shifted_grid
from wanexport.runtime.denoiser import Denoiser
from wanexport.runtime.sample import make_plan, sample, set_first_frame

Inputs = Mapping[str, Any]
Call = tuple[Inputs, np.ndarray]  # what a denoiser was given, and its velocity
Row = dict[str, Any]


class Recorder:
    """A denoiser that keeps its calls and times them."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser
        self.sampling, self.inputs = denoiser.sampling, denoiser.inputs
        self.calls: list[Call] = []
        self.seconds: list[float] = []

    def __call__(self, **inputs: Any) -> np.ndarray:
        """Call the denoiser."""
        started = time.perf_counter()
        velocity: np.ndarray = self.denoiser(**inputs)
        self.seconds.append(time.perf_counter() - started)
        self.calls.append((inputs, velocity))
        return velocity


@dataclass(frozen=True)
class Run:
    """The reference's calls by step, and the latent after each step of a loop."""

    steps: Sequence[Sequence[Call]]
    latents: Sequence[np.ndarray] = ()


@dataclass(frozen=True)
class Compared:
    """One call of the engine held against the reference's."""

    difference: Difference
    parity: Parity
    rounding: float | None  # of the weights: what the reference would differ with unrounded ones


def compare_runs(
    engine: Recorder,
    peers: Peers,
    given: dict[str, Any] | list[dict[str, np.ndarray]],
    *,
    steps: int,
    recorded: list[np.ndarray] | None,
    recorded_dtype: str | None,
    progress: Progress,
) -> tuple[list[Row], list[float]]:
    """The rows of the result, and how long each call of an eager reference took.

    given is the input of a loop of `steps` steps, or of single calls with or without recorded
    velocities; recorded_dtype is what these were computed in.
    """
    exact = None if peers.exact is None else Recorder(peers.exact)
    if isinstance(given, dict):
        assert exact is not None
        run = _loop(exact, given, steps, progress, "reference")
    elif recorded is None:
        assert exact is not None
        run = Run([[(call, exact(**call))] for call in given])
    else:
        run = Run([[pair] for pair in zip(given, recorded, strict=True)])
    rows: list[Row] = []
    for index, calls in enumerate(run.steps):
        progress("engine on the same inputs", index, len(run.steps))
        compared = [_compare_call(engine, peers, call, recorded_dtype) for call in calls]
        rows.append({"step": index, **_row(compared)})
    if isinstance(given, dict):
        own = _loop(engine, given, steps, progress, "engine on its own")
        _add_loop_figures(rows, run, own, _solver_errors(engine, run, given, steps))
    return rows, [] if exact is None or recorded else exact.seconds


def _loop(denoiser: Recorder, inputs: Inputs, steps: int, progress: Progress, stage: str) -> Run:
    """A free run; it ends early when a latent has NaN or Inf."""
    start = len(denoiser.calls)
    ends, latents = [start], []
    progress(stage, 0, steps)
    for step in sample(denoiser, steps=steps, **inputs):
        ends.append(len(denoiser.calls))
        latents.append(step.latent)
        progress(stage, len(latents), steps)
        if not np.isfinite(step.latent).all():
            break
    return Run([denoiser.calls[a:b] for a, b in pairwise(ends)], latents)


def _compare_call(
    engine: Recorder, peers: Peers, call: Call, recorded_dtype: str | None
) -> Compared:
    inputs, expected = call
    exact = expected
    if recorded_dtype is not None and peers.exact is not None:
        exact = peers.exact(**inputs)
    floors = {d: relative_l2(peer(**inputs), exact) for d, peer in peers.lower.items()}
    rounding = None
    if peers.unrounded is not None:
        rounding = relative_l2(exact, peers.unrounded(**inputs))
    distance = difference(engine(**inputs), expected)
    return Compared(
        difference=distance,
        parity=Parity(
            distance.error,
            floors.get(engine.denoiser.record.dtype),
            floors.get(recorded_dtype or "fp32"),
        ),
        rounding=rounding,
    )


def _row(compared: Sequence[Compared]) -> Row:
    """The figures of a step as JSON has them, null for NaN; of its calls the worst one counts."""
    worst = max(compared, key=lambda c: (not c.parity.passed, c.parity.error / c.parity.gate))
    figures = {
        **asdict(worst.difference),
        "floor": worst.parity.floor,
        "gate": worst.parity.gate,
        "rounding": worst.rounding,
    }
    counts = {kind: sum(getattr(c.difference, kind) for c in compared) for kind in ("nan", "inf")}
    return {name: _number(value) for name, value in figures.items()} | {
        **counts,
        "passed": worst.parity.passed,
        "drift": None,
        "solver": None,
    }


def _solver_errors(engine: Recorder, run: Run, inputs: Inputs, steps: int) -> list[float]:
    """Relative L2 of each latent against the fp64 solver on the same velocities."""
    if len(run.latents) < steps or not np.isfinite(run.latents[-1]).all():
        return []
    defaults, first = engine.sampling, inputs.get("first_frame")
    plan = make_plan(defaults, steps=steps)
    velocities = [_guided(step, g) for step, g in zip(run.steps, plan.guidance, strict=True)]
    exact = exact_latents(
        defaults.solver,
        inputs["noise"],
        shifted_grid(defaults.solver, steps, defaults.shift),
        lambda _, index: velocities[index],
        lambda latent: set_first_frame(latent, first),
    )
    return [relative_l2(latent, e) for latent, e in zip(run.latents, exact, strict=True)]


def _guided(calls: Sequence[Call], scale: float) -> np.ndarray:
    """The step's velocity in fp64 from its calls: with the text, and where guided without it."""
    conditional, *others = (velocity.astype(np.float64) for _, velocity in calls)
    return others[0] + scale * (conditional - others[0]) if others else conditional


def _add_loop_figures(rows: Sequence[Row], run: Run, own: Run, solver: Sequence[float]) -> None:
    """Note drift and solver error in every row; a NaN, or a wrong solver, fails it."""
    drift = [relative_l2(a, b) for a, b in zip(own.latents, run.latents)]
    missing = [nan] * len(rows)  # of a run that ended early
    for row, moved, error in zip(rows, [*drift, *missing], [*solver, *missing]):
        row["drift"], row["solver"] = _number(moved), _number(error)
        row["passed"] = bool(row["passed"] and isfinite(moved) and error <= FP32_GATE)


def _number(value: float | None) -> float | None:
    return value if value is not None and isfinite(value) else None
