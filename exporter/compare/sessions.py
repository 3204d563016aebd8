"""Calls of a denoiser that are recorded with their sessions, and the same calls of another one."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from wanexport.runtime.denoiser import Denoiser

Inputs = Mapping[str, Any]
Velocity = Callable[..., np.ndarray]  # of inputs by name


class Sessions(Protocol):
    """What a denoiser offers to a loop."""

    def session(self, **constant: Any) -> Velocity:
        """Calls that share these inputs, and whatever the model keeps between them."""


@dataclass(frozen=True)
class Call:
    """What a denoiser was given, and its velocity.

    `session` is the number of its session, which was opened with the constant inputs; None for a
    call that has a session of its own.
    """

    given: Inputs
    velocity: np.ndarray
    session: int | None = None
    constant: Inputs = field(default_factory=dict)

    @property
    def inputs(self) -> dict[str, Any]:
        """All that decided the velocity but for the session's earlier calls."""
        return {**self.constant, **self.given}


class Recorder:
    """A denoiser whose calls are timed and, while `keep` is set, kept."""

    def __init__(self, denoiser: Denoiser, *, keep: bool = False) -> None:
        self.denoiser, self.keep = denoiser, keep
        self.calls: list[Call] = []
        self.seconds: list[float] = []
        self._sessions = 0

    def __call__(self, **inputs: Any) -> np.ndarray:
        """Call the denoiser in a session of this call alone."""
        return self.session()(**inputs)

    def session(self, **constant: Any) -> Velocity:
        """Open a session of the denoiser, whose calls have its number."""
        number, self._sessions = self._sessions, self._sessions + 1
        session = self.denoiser.session(**constant)

        def call(**given: Any) -> np.ndarray:
            velocity = self._timed(session, given)
            return self._kept(Call(given, velocity, number, constant))

        return call

    def __getattr__(self, name: str) -> Any:
        """What else a loop asks of a denoiser: its inputs and sampling defaults."""
        return getattr(self.denoiser, name)

    def _timed(self, velocity_of: Velocity, given: Inputs) -> np.ndarray:
        started = time.perf_counter()
        velocity = velocity_of(**given)
        self.seconds.append(time.perf_counter() - started)
        return velocity

    def _kept(self, call: Call) -> np.ndarray:
        if self.keep:
            self.calls.append(call)
        return call.velocity


class Replay:
    """A denoiser that repeats another's calls in their order, each in the session that it was in.

    What the model keeps between the calls of a session is its own.
    """

    def __init__(self, denoiser: Sessions) -> None:
        self.denoiser = denoiser
        self._sessions: dict[int, Velocity] = {}

    def __call__(self, call: Call) -> np.ndarray:
        """The velocity for what a call was given."""
        if call.session is None:
            return self.denoiser.session()(**call.inputs)
        if call.session not in self._sessions:
            self._sessions[call.session] = self.denoiser.session(**call.constant)
        return self._sessions[call.session](**call.given)
