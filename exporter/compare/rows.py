"""The rows of `compare`: the engine's calls and loop against the reference's."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from math import inf, isfinite, nan
from typing import Any, NamedTuple

import numpy as np

from wanexport.exporter.backends.backend import Progress
from wanexport.exporter.compare.bisect import number
from wanexport.exporter.compare.peers import Key, Peers
from wanexport.exporter.compare.recorded import Calls, Loop
from wanexport.exporter.compare.sessions import Call, Inputs, Recorder, Replay
from wanexport.exporter.reference.parity import (
    FP32_NOISE,
    Difference,
    Parity,
    difference,
    relative_l2,
)
from wanexport.runtime.denoiser import Denoiser
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

    `recorded` is the rounding of a recorded reference, `other` that of an engine as the reference,
    `rounding` that of the weights against the checkpoint's, or that engine's, and `eager` the error
    of the reference's own model in fp32 against a recording.
    """

    call: Call
    difference: Difference
    parity: Parity
    recorded: float | None
    other: float | None
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
        other = {} if peers.other is None else peers.other.eager
        self.other = {key: Replay(peer) for key, peer in other.items()}

    def velocities(self, call: Call, known: Mapping[Key, np.ndarray]) -> dict[Key, np.ndarray]:
        """The eager velocities for what a call was given; what is known is not computed."""
        missing = {key: peer for key, peer in self.eager.items() if key not in known}
        return {**known, **{key: peer(call) for key, peer in missing.items()}}


@dataclass(frozen=True)
class Worst:
    """The worst call of a comparison, its step, and the session's calls before it."""

    step: int
    call: Call
    before: Sequence[Call]


class Rows(NamedTuple):
    """A row for each step or call, how long the reference's calls took, and the worst of all."""

    rows: list[Row]
    reference_seconds: list[float]
    worst: Worst

    @property
    def passed(self) -> bool:
        """Whether every step did."""
        return all(row["passed"] for row in self.rows)


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

    def rows(self, given: Loop | Calls) -> Rows:
        """Compare every step of a loop, or every call."""
        return self._loop(given) if isinstance(given, Loop) else self._calls(given)

    def _loop(self, given: Loop) -> Rows:
        reference = Recorder(self._reference, keep=True)
        run = _sample(reference, given, self.progress, "reference")
        rows, calls = self._rows(run, None)
        own = _sample(self.engine, given, self.progress, "engine on its own")
        add_drift(rows, run, own)
        return Rows(rows, reference.seconds, _worst(rows, calls, run))

    def _calls(self, given: Calls) -> Rows:
        velocities, seconds = given.velocities, list[float]()
        if given.recorded_dtype is None:
            reference = Recorder(self._reference)
            velocities, seconds = [reference(**i) for i in given.inputs], reference.seconds
        pairs = zip(given.inputs, velocities, strict=True)
        run = Run([[Call(*pair)] for pair in pairs])
        rows, calls = self._rows(run, given.recorded_dtype)
        return Rows(rows, seconds, _worst(rows, calls, run))

    def _rows(self, run: Run, recorded_dtype: str | None) -> tuple[list[Row], list[Call]]:
        """A row for each step, and the call that it is of."""
        rows, worst, sides = [], [], _Sides(self.engine, self.peers)
        for index, calls in enumerate(run.steps):
            self.progress("engine on the same inputs", index, len(run.steps))
            compared = [self._call(sides, call, recorded_dtype) for call in calls]
            rows.append({"step": index, **row_of(compared)})
            worst.append(max(compared, key=_over_gate).call)
        return rows, worst

    def _call(self, sides: _Sides, call: Call, recorded_dtype: str | None) -> Compared:
        expected, is_eager = call.velocity, recorded_dtype is None and self.peers.other is None
        velocities = sides.velocities(call, {self._exact: expected} if is_eager else {})
        recorded = _noise(velocities, self.implementation, recorded_dtype)
        other, rounding = self._of_weights(sides, call, velocities)
        velocity = sides.engine(call)
        distance = difference(velocity, expected)
        floor = _noise(velocities, "graph", self.engine.denoiser.record.dtype)
        others = () if is_eager else (recorded, other, rounding)
        parity = Parity(distance.error, floor, tuple(e for e in others if e is not None))
        if self.peers.other is not None:
            parity = replace(parity, others=(*parity.others, FP32_NOISE))
        self._keep(call, velocity, parity)
        is_eager_known = recorded_dtype is not None and self._exact in velocities
        return Compared(
            call=call,
            difference=distance,
            parity=parity,
            recorded=recorded,
            other=other,
            rounding=rounding,
            eager=relative_l2(velocities[self._exact], expected) if is_eager_known else None,
        )

    def _of_weights(
        self, sides: _Sides, call: Call, velocities: Mapping[Key, np.ndarray]
    ) -> tuple[float | None, float | None]:
        """What the other engine's precision does, and what rounding weights otherwise does."""
        other = self.peers.other
        if other is not None:
            there = {key: peer(call) for key, peer in sides.other.items()}
            floor = _noise(there or velocities, "graph", other.denoiser.record.dtype)
            exact = "graph", "fp32"
            return floor, relative_l2(velocities[exact], there[exact]) if there else None
        if sides.unrounded is not None:
            return None, relative_l2(velocities[self._exact], sides.unrounded(call))
        return None, None

    @property
    def _reference(self) -> Denoiser:
        """What a loop follows, and calls are held against."""
        other = self.peers.other
        return self.peers.eager[self._exact] if other is None else other.denoiser

    @property
    def _exact(self) -> Key:
        """The eager peer that is right."""
        return self.implementation, "fp32"

    def _keep(self, call: Call, velocity: np.ndarray, parity: Parity) -> None:
        if self.kept is not None:
            gate = parity.gate * float(np.linalg.norm(call.velocity.astype(np.float64)))
            self.kept.append(ComparedCall(call.inputs, call.velocity, velocity, gate))


def _worst(rows: Sequence[Row], calls: Sequence[Call], run: Run) -> Worst:
    """The call of the worst row, and what its session was given before it."""
    row = max(rows, key=badness)
    call = calls[row["step"]]
    in_order = [own for step in run.steps for own in step]
    earlier = in_order[: next(i for i, own in enumerate(in_order) if own is call)]
    before = [own for own in earlier if own.session is not None and own.session == call.session]
    return Worst(row["step"], call, before)


def badness(row: Row) -> tuple[bool, float]:
    """What makes one step worse than another: that it failed, and how far."""
    ratio = inf if row["error"] is None else row["error"] / (row["gate"] or inf)
    return not row["passed"], ratio


def _over_gate(compared: Compared) -> float:
    return compared.parity.over_gate


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


def row_of(compared: Sequence[Compared]) -> Row:
    """The figures of a step as JSON has them, null for NaN; of its calls the worst one counts."""
    worst = max(compared, key=_over_gate)
    figures = {
        **asdict(worst.difference),
        "floor": worst.parity.floor,
        "gate": worst.parity.gate,
        "recorded": worst.recorded,
        "other": worst.other,
        "rounding": worst.rounding,
        "eager": worst.eager,
    }
    counts = {kind: sum(getattr(c.difference, kind) for c in compared) for kind in ("nan", "inf")}
    return {name: number(value) for name, value in figures.items()} | {
        **counts,
        "passed": worst.parity.passed,
        "drift": None,
    }


def add_drift(rows: Sequence[Row], run: Run, own: Run) -> None:
    """Note in every row how far the engine's own loop is off by then; a NaN fails the row."""
    drift = [relative_l2(a, b) for a, b in zip(own.latents, run.latents)]
    missing = [nan] * len(rows)  # of a run that ended early
    for row, moved in zip(rows, [*drift, *missing]):
        row["drift"] = number(moved)
        row["passed"] = bool(row["passed"] and isfinite(moved))
