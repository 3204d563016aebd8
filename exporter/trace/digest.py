"""The digest of a trace: where the time of a step went. All figures are those of one step.

Times are seconds. What a trace does not say is None.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from wanexport.exporter.trace.event import ANYWHERE, CALL, OPERATOR, Called
from wanexport.exporter.trace.gaps import gaps_of, launches
from wanexport.exporter.trace.kinds import KINDS, OTHER
from wanexport.exporter.trace.rates import Rates
from wanexport.exporter.trace.spans import busy_share, parents, self_times, union
from wanexport.exporter.trace.steps import Steps
from wanexport.exporter.trace.waits import Wait
from wanexport.exporter.trace.work import Work, work_of

MOST = 20  # of the largest kernels or operators
_GAPS = 5
_MICRO = 1e-6
OUTSIDE = "outside operators"  # on a CPU: Python, and code that no profiler sees into


def digest(steps: Steps, waits: Sequence[Wait], rates: Rates | None) -> dict[str, Any]:
    """Everything that the steps of a trace tell; waits are those of as many steps."""
    work = work_of(steps)
    outside = None if steps.device else _outside(steps)
    total = sum(item.duration for item in work) + (outside or 0.0)
    scale = _MICRO / steps.count
    return {
        "steps": steps.count,
        "device": "gpu" if steps.device else "cpu",
        "seconds_per_step": _wall(steps) * scale,
        "host_seconds_per_step": sum(window.duration for window in steps.windows) * scale,
        "seconds": total * scale,
        "kinds": _kinds(work, outside, total, scale, rates, steps.count),
        "gpu": _gpu(steps, scale) if steps.device else None,
        "host": _host(steps, scale),
        "waits": waits_digest(waits, steps.count),
        "largest": _largest(work, total, scale, rates, steps.count),
    }


def _wall(steps: Steps) -> float:
    """From the start of the first step to the end of the last one, or of what it left running."""
    start = steps.windows[0].start
    end = max(event.end for event in (*steps.windows, *steps.device))
    return end - start if steps.device else sum(window.duration for window in steps.windows)


def _outside(steps: Steps) -> float:
    """The time of the steps in which their own threads run no operator."""
    places = {window.place for window in steps.windows}
    operators = [event for event in steps.host if event.kind == OPERATOR]
    if places != {ANYWHERE}:
        operators = [event for event in operators if event.place in places]
    inside = sum(end - start for start, end in union((e.start, e.end) for e in operators))
    return max(0.0, sum(window.duration for window in steps.windows) - inside)


def _kinds(
    work: Sequence[Work],
    outside: float | None,
    total: float,
    scale: float,
    rates: Rates | None,
    steps: int,
) -> list[dict[str, Any]]:
    """The time of each kind; together they are all of it."""
    items: dict[str, list[Work]] = defaultdict(list)
    for item in work:
        items[item.kind].append(item)
    rows = [
        _row(kind, items[kind], total, scale, rates, steps)
        for kind in KINDS
        if items[kind] or kind != OTHER
    ]
    if outside is not None:
        share = outside / total if total else 0.0
        rows.append(
            {"kind": OUTSIDE, "count": None, "seconds": outside * scale, "share": share}
            | {"flops": None, "bytes": None, "floor_seconds": None}
        )
    return rows


def _row(
    name: str, items: Sequence[Work], total: float, scale: float, rates: Rates | None, steps: int
) -> dict[str, Any]:
    taken = sum(item.duration for item in items)
    flops, moved = _sum(item.flops for item in items), _sum(item.moved for item in items)
    floor = rates.floor(flops, moved) if rates and items else None
    return {
        "kind": name,
        "count": len(items) / steps,
        "seconds": taken * scale,
        "share": taken / total if total else 0.0,
        "flops": None if flops is None or not items else flops / steps,
        "bytes": None if moved is None or not items else moved / steps,
        "floor_seconds": None if floor is None else floor / steps,
    }


def _sum(counts: Iterable[int | None]) -> int | None:
    """The sum; None where one of them is unknown."""
    known: int = 0
    for count in counts:
        if count is None:
            return None
        known += count
    return known


def _largest(
    work: Sequence[Work], total: float, scale: float, rates: Rates | None, steps: int
) -> list[dict[str, Any]]:
    groups: dict[tuple[str, str], list[Work]] = defaultdict(list)
    for item in work:
        groups[item.name, item.kind].append(item)
    ranked = sorted(groups.items(), key=lambda pair: -sum(item.duration for item in pair[1]))
    return [
        {"name": name, **_row(kind, items, total, scale, rates, steps)}
        for (name, kind), items in ranked[:MOST]
    ]


def _gpu(steps: Steps, scale: float) -> dict[str, Any]:
    count, taken, largest = gaps_of(steps, _GAPS)
    return {
        "busy": busy_share((event.start, event.end) for event in steps.device),
        "streams": len({event.place for event in steps.device}),
        "launches": launches(steps) / steps.count,
        "gaps": count / steps.count,
        "gap_seconds": taken * scale,
        "largest_gaps": [{"seconds": gap.duration * _MICRO, "host": gap.host} for gap in largest],
    }


def _host(steps: Steps, scale: float) -> dict[str, Any]:
    """How the host spent a step: in operators, in calls of the GPU's library, in Python."""
    events = [event for event in steps.host if event.kind in (OPERATOR, CALL)]
    own = self_times(events, parents(events))
    taken = {
        kind: sum(t for e, t in zip(events, own) if e.kind == kind) for kind in (OPERATOR, CALL)
    }
    return {
        "operators": sum(event.kind == OPERATOR for event in events) / steps.count,
        "operator_seconds": taken[OPERATOR] * scale,
        "call_seconds": taken[CALL] * scale,
        "outside_seconds": _outside(steps) * scale,
    }


def waits_digest(waits: Sequence[Wait], steps: int) -> dict[str, Any]:
    """The waits of a step, for each line and cause; most time first, then most of them."""
    groups: dict[tuple[Any, ...], list[Wait]] = defaultdict(list)
    for wait in waits:
        groups[wait.called, wait.cause, wait.for_gpu].append(wait)
    rows = [
        {
            **_place(called),
            "cause": cause,
            "for_gpu": for_gpu,
            "count": len(own) / steps,
            "seconds": sum(wait.duration for wait in own) * _MICRO / steps,
        }
        for (called, cause, for_gpu), own in groups.items()
    ]
    rows.sort(key=lambda row: (-row["for_gpu"], -row["seconds"], -row["count"]))
    return {
        "for_gpu": sum(wait.for_gpu for wait in waits) / steps,
        "reads": sum(not wait.for_gpu for wait in waits) / steps,
        "seconds": sum(wait.duration for wait in waits if wait.for_gpu) * _MICRO / steps,
        "lines": rows,
    }


def _place(called: Called) -> dict[str, Any]:
    """The line of a wait, or None; where it is only known to be in a function, that one's first."""
    line, *others = called.lines or (None,)
    return {
        "line": line and str(line),
        "function": line and line.function,
        "is_exact": line and line.is_call,
        "called": called.name or None,
        "called_from": [str(other) for other in others],
    }


def with_known_flops(
    kinds: Sequence[dict[str, Any]], known: Mapping[str, int], rates: Rates
) -> None:
    """Give kinds the FLOPs of a step that are known of the model, where no shapes told them."""
    for row in kinds:
        if row["kind"] in known and row["flops"] is None and row["count"]:
            row["flops"] = known[row["kind"]]
            row["floor_seconds"] = rates.floor(row["flops"], None)
