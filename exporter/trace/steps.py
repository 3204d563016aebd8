"""The part of a trace that is a model's: what its steps did on the host and on the GPU."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from wanexport.exporter.trace.event import CALL, DEVICE, FRAME, MARK, OPERATOR, STEP, Event

_PROFILER_STEP = re.compile(r"ProfilerStep#\d+")


@dataclass(frozen=True)
class Steps:
    """The steps of a trace, what the host did within them, and what it started on the GPU.

    `windows` are the marks of steps in order; without any the whole trace is one step.
    """

    windows: list[Event]
    host: list[Event]  # in order of time: operators, calls, marks and frames
    device: list[Event]

    @property
    def count(self) -> int:
        """How many steps there are."""
        return len(self.windows)


def steps_of(events: Sequence[Event]) -> Steps:
    """The steps of a trace: ours, or those of the user's `profiler.step()`.

    What the profiler does before and after them, and a last wait for the GPU, is not theirs. A
    kernel belongs to a step if what launched it does.
    """
    windows = _windows(events)
    host = [e for e in events if e.kind in (OPERATOR, CALL, MARK, FRAME) and e not in windows]
    inside = [event for event in host if _is_in(event, windows)]
    launched = {event.link: event for event in host if event.kind == CALL}
    own = {event.link for event in inside if event.kind == CALL}
    device = [
        event
        for event in events
        if event.kind == DEVICE
        and (event.link in own if event.link in launched else _is_in(event, windows))
    ]
    return Steps(windows, inside, device)


def _windows(events: Sequence[Event]) -> list[Event]:
    marks = [event for event in events if event.kind == MARK]
    ours = [event for event in marks if event.name == STEP]
    if found := ours or [event for event in marks if _PROFILER_STEP.fullmatch(event.name)]:
        return found
    first, last = min(e.start for e in events), max(e.end for e in events)
    return [Event(STEP, MARK, first, last)]


def _is_in(event: Event, windows: Sequence[Event]) -> bool:
    return any(window.start <= event.start <= window.end for window in windows)
