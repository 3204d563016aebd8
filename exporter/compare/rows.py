"""The rows of `compare`: the engine's calls and loop against the reference's."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import isfinite, nan
from typing import Any

import numpy as np

from wanexport.exporter.backends.backend import Progress
from wanexport.exporter.compare.peers import Key, Peers
from wanexport.exporter.compare.recorded import Calls, Loop
from wanexport.exporter.compare.sessions import Call, Inputs, Recorder, Replay
from wanexport.exporter.reference.parity import Difference, Parity, difference, relative_l2
from wanexport.runtime.sample import sample

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """The reference's calls by step, and the latent after each step of a loop."""

    steps: Sequence[Sequence[Call]]
    latents: Sequence[np.ndarray] = ()


@dataclass(frozen=True)
class Compared:
    """One call of the engine held against the reference's.

    `recorded` is the rounding of a recorded reference, `rounding` that of the weights against the
    checkpoint's, and `eager` the error of the reference's own model in fp32 against a recording.
    """

    difference: Difference
    parity: Parity
    recorded: float | None
    rounding: float | None
    eager: float | None


@dataclass(frozen=True)
class ComparedCall:
    """What engine and reference were both given, and their velocities.

    `distance_gate` is the largest L2 distance between them that passes.
    """

    inputs: Inputs
    reference: np.ndarray
    velocity: np.ndarray
    distance_gate: float


class _Sides:
    """Engine and peers, each of which repeats the reference's calls in sessions of its own."""

    def __init__(self, engine: Recorder, peers: Peers) -> None:
        self.engine = Replay(engine)
        self.eager = {key: Replay(peer) for key, peer in peers.eager.items()}
        self.unrounded = None if peers.unrounded is None else Replay(peers.unrounded)

    def velocities(self, call: Call, known: Mapping[Key, np.ndarray]) -> dict[Key, np.ndarray]:
        """The eager velocities for what a call was given; what is known is not computed."""
        missing = {key: peer for key, peer in self.eager.items() if key not in known}
        return {**known, **{key: peer(call) for key, peer in missing.items()}}


@dataclass(frozen=True)
class Comparison:
    """An engine, what it is held against, and whose fp32 forward is the reference.

    Every compared call is added to `kept`, where that is a list.
    """

    engine: Recorder
    peers: Peers
    implementation: str
    progress: Progress
    kept: list[ComparedCall] | None = None

    def rows(self, given: Loop | Calls) -> tuple[list[Row], list[float]]:
        """A row for each step or call, and how long each call of an eager reference took."""
        return self._loop(given) if isinstance(given, Loop) else self._calls(given)

    def _loop(self, given: Loop) -> tuple[list[Row], list[float]]:
        reference = Recorder(self.peers.eager[self._exact], keep=True)
        run = _sample(reference, given, self.progress, "reference")
        rows = self._rows(run, None)
        own = _sample(self.engine, given, self.progress, "engine on its own")
        _add_drift(rows, run, own)
        return rows, reference.seconds

    def _calls(self, given: Calls) -> tuple[list[Row], list[float]]:
        if given.recorded_dtype is not None:
            pairs = zip(given.inputs, given.velocities, strict=True)
            return self._rows(Run([[Call(*pair)] for pair in pairs]), given.recorded_dtype), []
        reference = Recorder(self.peers.eager[self._exact])
        run = Run([[Call(inputs, reference(**inputs))] for inputs in given.inputs])
        return self._rows(run, None), reference.seconds

    def _rows(self, run: Run, recorded_dtype: str | None) -> list[Row]:
        rows, sides = [], _Sides(self.engine, self.peers)
        for index, calls in enumerate(run.steps):
            self.progress("engine on the same inputs", index, len(run.steps))
            compared = [self._call(sides, call, recorded_dtype) for call in calls]
            rows.append({"step": index, **_row(compared)})
        return rows

    def _call(self, sides: _Sides, call: Call, recorded_dtype: str | None) -> Compared:
        expected = call.velocity
        known = {} if recorded_dtype else {self._exact: expected}
        velocities = sides.velocities(call, known)
        rounding = None
        if sides.unrounded is not None:
            rounding = relative_l2(velocities[self._exact], sides.unrounded(call))
        recorded = _noise(velocities, self.implementation, recorded_dtype)
        velocity = sides.engine(call)
        distance = difference(velocity, expected)
        floor = _noise(velocities, "graph", self.engine.denoiser.record.dtype)
        others = (recorded, rounding) if recorded_dtype else ()
        parity = Parity(distance.error, floor, tuple(e for e in others if e is not None))
        self._keep(call, velocity, parity)
        is_eager_known = recorded_dtype is not None and self._exact in velocities
        return Compared(
            difference=distance,
            parity=parity,
            recorded=recorded,
            rounding=rounding,
            eager=relative_l2(velocities[self._exact], expected) if is_eager_known else None,
        )

    @property
    def _exact(self) -> Key:
        """The eager peer that is right."""
        return self.implementation, "fp32"

    def _keep(self, call: Call, velocity: np.ndarray, parity: Parity) -> None:
        if self.kept is not None:
            gate = parity.gate * float(np.linalg.norm(call.velocity.astype(np.float64)))
            self.kept.append(ComparedCall(call.inputs, call.velocity, velocity, gate))


def _noise(
    velocities: Mapping[Key, np.ndarray], implementation: str, dtype: str | None
) -> float | None:
    """Error of one implementation in a lower precision against itself in fp32."""
    if dtype in (None, "fp32"):
        return None
    return relative_l2(velocities[implementation, dtype], velocities[implementation, "fp32"])


def _sample(denoiser: Recorder, given: Loop, progress: Progress, stage: str) -> Run:
    """A free run; it ends early when a latent has NaN or Inf."""
    ends, latents = [0], []
    progress(stage, 0, given.steps)
    for step in sample(denoiser, steps=given.steps, **given.inputs):
        ends.append(len(denoiser.calls))
        latents.append(step.latent)
        progress(stage, len(latents), given.steps)
        if not np.isfinite(step.latent).all():
            break
    return Run([denoiser.calls[a:b] for a, b in pairwise(ends)], latents)


def _row(compared: Sequence[Compared]) -> Row:
    """The figures of a step as JSON has them, null for NaN; of its calls the worst one counts."""
    worst = max(compared, key=lambda c: c.parity.over_gate)
    figures = {
        **asdict(worst.difference),
        "floor": worst.parity.floor,
        "gate": worst.parity.gate,
        "recorded": worst.recorded,
        "rounding": worst.rounding,
        "eager": worst.eager,
    }
    counts = {kind: sum(getattr(c.difference, kind) for c in compared) for kind in ("nan", "inf")}
    return {name: _number(value) for name, value in figures.items()} | {
        **counts,
        "passed": worst.parity.passed,
        "drift": None,
    }


def _add_drift(rows: Sequence[Row], run: Run, own: Run) -> None:
    """Note in every row how far the engine's own loop is off by then; a NaN fails the row."""
    drift = [relative_l2(a, b) for a, b in zip(own.latents, run.latents)]
    missing = [nan] * len(rows)  # of a run that ended early
    for row, moved in zip(rows, [*drift, *missing]):
        row["drift"] = _number(moved)
        row["passed"] = bool(row["passed"] and isfinite(moved))


def _number(value: float | None) -> float | None:
    return value if value is not None and isfinite(value) else None
