"""The time in which the GPU has nothing to do, and what the host does meanwhile."""

from typing import NamedTuple

from wanexport.exporter.trace.event import CALL, OPERATOR
from wanexport.exporter.trace.spans import gaps
from wanexport.exporter.trace.steps import Steps

PYTHON = "Python, in no operator"


class Gap(NamedTuple):
    """Microseconds without any work on the GPU, and what the host did for most of them."""

    start: float
    duration: float
    host: str


def gaps_of(steps: Steps, most: int) -> tuple[int, float, list[Gap]]:
    """How many gaps there are on the GPU, how long all of them are, and the longest few."""
    found = gaps((event.start, event.end) for event in steps.device)
    longest = sorted(found, key=lambda gap: gap[0] - gap[1])[:most]
    largest = [Gap(start, end - start, _host(steps, start, end)) for start, end in longest]
    return len(found), sum(end - start for start, end in found), largest


def _host(steps: Steps, start: float, end: float) -> str:
    """The event that covers most of a span; of those that cover as much, the innermost."""
    best, most, length = PYTHON, (end - start) / 2, float("inf")
    for event in steps.host:
        if event.kind not in (OPERATOR, CALL):
            continue
        covered = min(end, event.end) - max(start, event.start)
        if covered > most or (covered == most and event.duration < length):
            best, most, length = event.name, covered, event.duration
    return best


def launches(steps: Steps) -> int:
    """How many times the host started something on the GPU; a CUDA graph is one."""
    started = {event.link for event in steps.device}
    calls = [event for event in steps.host if event.kind == CALL]
    return sum(event.link in started for event in calls if event.link is not None)
