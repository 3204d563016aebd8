"""Traces written by hand, as events and in the form of PyTorch's exporter."""

from typing import Any

from wanexport.exporter.trace.event import CALL, DEVICE, MARK, OPERATOR, STEP, Event, Tensor
from wanexport.exporter.trace.steps import Steps, steps_of

HOST = ("1", "1")


def step(start: float, end: float) -> Event:
    """The mark of a step."""
    return Event(STEP, MARK, start, end, HOST)


def op(name: str, start: float, end: float, *, number: int | None = None, **more: Any) -> Event:
    """An operator of the host."""
    return Event(name, OPERATOR, start, end, HOST, operator=number, **more)


def call(name: str, start: float, end: float, link: int | None = None) -> Event:
    """A call of CUDA."""
    return Event(name, CALL, start, end, HOST, link=link)


def kernel(
    name: str, start: float, end: float, link: int, *, stream: int = 7, number: int | None = None
) -> Event:
    """What such a call started on the GPU."""
    return Event(name, DEVICE, start, end, ("0", str(stream)), link=link, operator=number)


def mark(name: str, start: float, end: float) -> Event:
    """A span that a program named."""
    return Event(name, MARK, start, end, HOST)


def steps(*events: Event) -> Steps:
    """The steps of these events, in whatever order they are given."""
    return steps_of(sorted(events, key=lambda event: (event.start, -event.end)))


def floats(*sizes: int, strides: tuple[int, ...] | None = None) -> Tensor:
    """An fp32 tensor."""
    return Tensor("float", sizes, strides)


def raw(cat: str, name: str, ts: float, dur: float, **args: Any) -> dict[str, Any]:
    """An event as PyTorch exports it."""
    return {"ph": "X", "cat": cat, "name": name, "pid": 1, "tid": 1, "ts": ts, "dur": dur,
            "args": args}  # fmt: skip


ITEM = (  # x.item() of a tensor on a GPU, from start to start + 10
    ("aten::item", 0, 10),
    ("aten::_local_scalar_dense", 1, 9),
)


def item(start: float, link: int) -> list[Event]:
    """What `x.item()` of a tensor on a GPU leaves: 5 of its 10 microseconds are a wait."""
    return [
        *(op(name, start + begin, start + end) for name, begin, end in ITEM),
        call("cudaMemcpyAsync", start + 2, start + 3, link),
        call("cudaStreamSynchronize", start + 4, start + 8),
        kernel("Memcpy DtoH (Device -> Pageable)", start + 5, start + 6, link),
    ]
