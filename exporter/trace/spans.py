"""Arithmetic of spans of time: which lies in which, how much of them is covered."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

from wanexport.exporter.trace.event import Event

Span = tuple[float, float]


def parents(events: Sequence[Event]) -> list[int | None]:
    """For each event the index of the innermost other one of its thread that it lies in.

    The events are in order of time, of two that begin together the longer one first.
    """
    found: list[int | None] = []
    open_events: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index, event in enumerate(events):
        stack = open_events[event.place]
        while stack and events[stack[-1]].end <= event.start:
            stack.pop()
        found.append(stack[-1] if stack else None)
        stack.append(index)
    return found


def ancestors(index: int, of: Sequence[int | None]) -> Iterator[int]:
    """The indices of what an event lies in, innermost first, itself among them."""
    here: int | None = index
    while here is not None:
        yield here
        here = of[here]


def self_times(events: Sequence[Event], of: Sequence[int | None]) -> list[float]:
    """The microseconds of each event in which none that lies in it ran."""
    left = [event.duration for event in events]
    for event, parent in zip(events, of):
        if parent is not None:
            left[parent] -= min(event.end, events[parent].end) - event.start
    return [max(0.0, own) for own in left]


def union(spans: Iterable[Span]) -> list[Span]:
    """The same time as spans in order that do not meet."""
    joined: list[Span] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def gaps(spans: Iterable[Span]) -> list[Span]:
    """The time between the first start and the last end in which no span is."""
    joined = union(spans)
    return [(before[1], after[0]) for before, after in pairwise(joined)]


def busy_share(spans: Iterable[Span]) -> float | None:
    """Time in which anything runs, over that from the first start to the last end."""
    joined = union(spans)
    if not joined:
        return None
    whole = joined[-1][1] - joined[0][0]
    return sum(end - start for start, end in joined) / whole if whole else 1.0
