"""What the time of a trace went to: kernels of the GPU, or where there is none operators."""

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from wanexport.exporter.trace.event import OPERATOR, Event
from wanexport.exporter.trace.flops import flops
from wanexport.exporter.trace.kinds import ATTENTION, COPIES, ELEMENTWISE, OTHER, PRODUCTS, kind_of
from wanexport.exporter.trace.spans import ancestors, parents, self_times
from wanexport.exporter.trace.steps import Steps
from wanexport.exporter.trace.traffic import traffic

_ACROSS = re.compile(r"^Memcpy (HtoD|DtoH|PtoP)")  # not at the rate of a copy within memory


class Work(NamedTuple):
    """One kernel, or the time of one operator that is its own, in microseconds.

    `flops` and `moved`, in bytes, are what it had to do; None where that is unknown, and for what
    such a figure is not given.
    """

    name: str
    kind: str
    duration: float
    flops: int | None = None
    moved: int | None = None


def work_of(steps: Steps) -> list[Work]:
    """Each kernel, copy and fill on the GPU; without any, each operator's own time."""
    operators = [event for event in steps.host if event.kind == OPERATOR]
    of = parents(operators)
    if steps.device:
        places: dict[int | None, int] = {e.operator: i for i, e in enumerate(operators)}
        places.pop(None, None)
        durations = [event.duration for event in steps.device]
        owners = [places.get(event.operator) for event in steps.device]
        return _counted(steps.device, durations, owners, operators, of)
    own: list[int | None] = list(range(len(operators)))
    return _counted(operators, self_times(operators, of), own, operators, of)


def _counted(
    events: Sequence[Event],
    durations: Sequence[float],
    owners: Sequence[int | None],
    operators: Sequence[Event],
    of: Sequence[int | None],
) -> list[Work]:
    """The events as work, with what the operator that each of them is of had to do."""
    names = [None if owner is None else operators[owner].name for owner in owners]
    kinds = [_kind(event.name, name) for event, name in zip(events, names)]
    found_flops = _shared_flops(kinds, durations, owners, operators, of)
    found_bytes = _bytes(kinds, owners, operators, of)
    for index, event in enumerate(events):
        if _ACROSS.search(event.name):
            found_bytes[index] = None
    return [
        Work(event.name, kind, duration, found_flops[index], found_bytes[index])
        for index, (event, kind, duration) in enumerate(zip(events, kinds, durations))
    ]


def _kind(name: str, operator: str | None) -> str:
    """The kind of a kernel, told by the operator that it is of where its own name says nothing."""
    kind = kind_of(name)
    return kind_of(operator) if kind == OTHER and operator is not None else kind


def _shared_flops(
    kinds: Sequence[str],
    durations: Sequence[float],
    owners: Sequence[int | None],
    operators: Sequence[Event],
    of: Sequence[int | None],
) -> list[int | None]:
    """FLOPs of each item: of all that one operator took the longest has them, the others none.

    The operator is the innermost one whose FLOPs are known; those around it have none themselves.
    """
    known = [flops(event) for event in operators]
    outer = _around(known, of)
    items: dict[int, list[int]] = defaultdict(list)
    counted: list[int | None] = [None] * len(kinds)
    for item, (kind, owner) in enumerate(zip(kinds, owners)):
        if kind not in (PRODUCTS, ATTENTION) or owner is None:
            continue
        if owner in outer:
            counted[item] = 0
            continue
        found = next((i for i in ancestors(owner, of) if known[i] is not None), None)
        if found is not None:
            items[found].append(item)
    for operator, own in items.items():
        longest = max(own, key=durations.__getitem__)
        for item in own:
            counted[item] = known[operator] if item == longest else 0
    return counted


def _bytes(
    kinds: Sequence[str],
    owners: Sequence[int | None],
    operators: Sequence[Event],
    of: Sequence[int | None],
) -> list[int | None]:
    """Bytes of each item that is all that its operator took: what part of them one of several
    kernels moves is unknown."""
    moved = _own([traffic(e) for e in operators], of)
    counts: dict[int | None, int] = defaultdict(int)
    for owner in owners:
        counts[owner] += 1
    return [
        moved[owner]
        if owner is not None and counts[owner] == 1 and kind in (ELEMENTWISE, COPIES)
        else None
        for kind, owner in zip(kinds, owners)
    ]


def _own(moved: Sequence[int | None], of: Sequence[int | None]) -> list[int | None]:
    """The bytes of each operator that none of those within it moves."""
    own, inner = list(moved), [0] * len(moved)
    for index in reversed(range(len(moved))):  # what lies within an operator comes after it
        known, parent = moved[index], of[index]
        if inner[index]:
            own[index] = max(0, (known or 0) - inner[index])
        if parent is not None:
            inner[parent] += max(known or 0, inner[index])
    return own


def _around(known: Sequence[int | None], of: Sequence[int | None]) -> set[int]:
    """The operators around one of which a figure is known."""
    counted = (i for i, figure in enumerate(known) if figure)
    return {above for i in counted for above in ancestors(i, of) if above != i}
