"""A Chrome trace, as PyTorch's profiler exports it, read as events."""

import gzip
import json
import zlib
from collections.abc import Iterable, Mapping
from math import isfinite
from operator import index
from pathlib import Path
from typing import Any

from wanexport.exporter.trace.event import CALL, DEVICE, FRAME, MARK, OPERATOR, Event, Tensor
from wanexport.exporter.trace.lines import read_back, written
from wanexport.exporter.trace.waits import Wait
from wanexport.runtime.bundle.regular_file import open_regular
from wanexport.runtime.errors import BadRequest

_KINDS = {
    "cpu_op": OPERATOR,
    "cuda_runtime": CALL,
    "cuda_driver": CALL,
    "kernel": DEVICE,
    "gpu_memcpy": DEVICE,
    "gpu_memset": DEVICE,
    "user_annotation": MARK,
    "python_function": FRAME,
}
_MAGIC = b"\x1f\x8b"  # of gzip

CALLED = "Python called"  # among the arguments of an event: what `lines.written` makes
_EXPECTED = "expected what torch.profiler's export_chrome_trace wrote"

Trace = dict[str, Any]


def read_trace(path: Path) -> Trace:
    """The content of a trace's file, gzipped or not.

    Raises BadRequest when it is no trace, and OSError when it cannot be read.
    """
    with open(open_regular(path), "rb") as file:
        content = file.read()
    try:
        if content.startswith(_MAGIC):
            content = gzip.decompress(content)
        trace = json.loads(content)
    except (ValueError, EOFError, OSError, zlib.error, RecursionError) as error:
        reason = " ".join(str(error).split())[:80]
        raise BadRequest(f"{path} is no Chrome trace ({reason}): {_EXPECTED}") from error
    trace = {"traceEvents": trace} if isinstance(trace, list) else trace
    if not isinstance(trace, dict) or not isinstance(trace.get("traceEvents"), list):
        raise BadRequest(f"{path} is no Chrome trace (it has no traceEvents): {_EXPECTED}")
    return trace


def events_of(trace: Trace, what: str | Path = "the trace") -> list[Event]:
    """The events of a trace that a digest makes use of, in order of time.

    Raises BadRequest, naming what, when one of them is damaged.
    """
    events = []
    for raw in trace["traceEvents"]:
        kind = _KINDS.get(str(raw.get("cat"))) if isinstance(raw, dict) else None
        if kind is None or raw.get("ph") != "X":
            continue
        try:
            events.append(_event(raw, kind))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            name = str(raw.get("name"))[:40]
            raise BadRequest(f"{what} has a damaged event {name!r}: {_EXPECTED}") from error
    return sorted(events, key=lambda event: (event.start, -event.end))


def refuse_empty_trace(events: Iterable[Event], what: str | Path) -> None:
    """Raise BadRequest, naming what, unless there is an operator or a kernel among the events."""
    if not any(event.kind in (OPERATOR, DEVICE) for event in events):
        raise BadRequest(
            f"{what} is an empty trace, without operators and kernels: record steps of a model"
        )


def write_lines(trace: Trace, waits: Iterable[Wait]) -> None:
    """Put the lines of waits into the trace that they are of, where a viewer shows them."""
    found = {wait.start: written(wait.called) for wait in waits if wait.called.lines}
    for raw in trace["traceEvents"]:
        if raw.get("cat") in ("cpu_op", "cuda_runtime", "cuda_driver") and raw["ts"] in found:
            raw.setdefault("args", {})[CALLED] = found[raw["ts"]]


def _event(raw: Mapping[str, Any], kind: str) -> Event:
    args = raw.get("args") or {}
    start, duration = float(raw["ts"]), max(0.0, float(raw.get("dur", 0)))
    if not isfinite(start + duration):
        raise ValueError("a time that is no number")
    return Event(
        name=str(raw["name"]),
        kind=kind,
        start=start,
        end=start + duration,
        place=_place(raw, args, kind),
        link=_number(args.get("correlation")),
        operator=_number(args.get("External id")),
        given=_given(args) if kind == OPERATOR else (),
        made=tuple(_shapes(args.get("Output shapes", ()))) if kind == OPERATOR else (),
        values=tuple(map(str, args.get("Concrete Inputs", ()))) if kind == OPERATOR else (),
        called=read_back(args.get(CALLED)),
    )


def _place(raw: Mapping[str, Any], args: Mapping[str, Any], kind: str) -> tuple[str, str]:
    if kind == DEVICE:
        return str(args.get("device", raw.get("pid"))), str(args.get("stream", raw.get("tid")))
    return str(raw.get("pid")), str(raw.get("tid"))


def _number(value: Any) -> int | None:
    return None if value is None else int(value)


def _given(args: Mapping[str, Any]) -> tuple[Tensor | None, ...]:
    """The inputs of an operator; None is what is no tensor, or a list of them."""
    if "Input shapes" in args:  # of a node of ONNX Runtime
        return tuple(_shapes(args["Input shapes"]))
    types, sizes = args.get("Input type", ()), args.get("Input Dims", ())
    strides = args.get("Input Strides") or [None] * len(types)
    given: list[Tensor | None] = []
    for dtype, own, step in zip(types, sizes, strides):
        if dtype in _NO_TENSORS:
            given.append(None)
        elif dtype == "TensorList":
            given += _listed(own)
        else:
            given.append(Tensor(str(dtype), _whole(own), None if step is None else _whole(step)))
    return tuple(given)


_NO_TENSORS = ("", "Scalar", "ScalarList", "GenericList", "Dict", "None")


def _listed(sizes: Any) -> list[Tensor | None]:
    """A list of tensors, whose dtypes the profiler does not write."""
    return [Tensor("", _whole(own)) for own in sizes if isinstance(own, list)]


def _whole(numbers: Any) -> tuple[int, ...]:
    """Sizes or strides. Raises TypeError or ValueError when one is no number of memory."""
    found = tuple(map(index, numbers))
    if any(abs(number) >= 1 << 63 for number in found):
        raise ValueError("a size beyond any memory")
    return found


def _shapes(shapes: Any) -> list[Tensor]:
    """Tensors as ONNX Runtime's profiler writes them: `[{"float": [1, 128]}]`."""
    return [Tensor(dtype, tuple(map(int, sizes))) for one in shapes for dtype, sizes in one.items()]
