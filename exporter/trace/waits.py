"""Where the host waits for the GPU, or reads a value that it would have to wait for there.

A wait is what one operator takes: `aten::item`, the `aten::_local_scalar_dense` within it, the copy
and the synchronisation are one. A read is an operator whose result the host needs, on tensors that
are not on a GPU: there nobody waits, but the same line would with tensors on a GPU.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from wanexport.exporter.trace.event import CALL, OPERATOR, UNKNOWN, Called, Event
from wanexport.exporter.trace.lines import called, frame_line
from wanexport.exporter.trace.spans import ancestors, parents
from wanexport.exporter.trace.steps import Steps

_WAITING = {
    *("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy"),
    *("cuStreamSynchronize", "cuCtxSynchronize", "cuEventSynchronize"),
    *("hipStreamSynchronize", "hipDeviceSynchronize", "hipEventSynchronize", "hipMemcpy"),
}
_READING = {  # operators of whose result the host needs the value or the size
    f"aten::{name}"
    for name in (
        *("is_nonzero", "item", "_local_scalar_dense", "equal", "allclose", "bincount"),
        *("nonzero", "nonzero_numpy", "argwhere", "masked_select", "_unique", "_unique2"),
        *("unique_dim", "unique_consecutive", "unique_dim_consecutive"),
    )
}
# Which read the number that they fill with, mostly one of Python's: on the host at any rate.
_FILLING = {"aten::index_put_", "aten::_index_put_impl_", "aten::masked_fill_", "aten::fill_"}
_VALUES = {"aten::item", "aten::_local_scalar_dense"}
_READING_CALLS = {"Tensor.tolist"}  # of Python, in which PyTorch's profiler sees no operator
_MOVING_CALLS = {"Tensor.cpu", "torch.tensor", "torch.as_tensor"}  # the same, with all on a CPU


class Wait(NamedTuple):
    """One wait or read: its cause, when it began and for how long, and what Python called.

    Times are microseconds. `for_gpu` says that the host waited. The lines of `called` are empty
    where they are unknown. `is_call` says that its cause is known to Python alone: without marks of
    lines a trace does not show it.
    """

    cause: str
    start: float
    duration: float
    for_gpu: bool
    called: Called = UNKNOWN
    is_call: bool = False


def waits_of(steps: Steps, calls: Sequence[Called] = ()) -> list[Wait]:
    """The waits and reads of all steps, in order of time; calls are what marks of lines name."""
    tree = _Tree(steps, calls)
    waiting = _waiting(tree, steps)
    over = {above for group in waiting for above in ancestors(group, tree.parents)}
    found = [_wait(tree, group, taken, for_gpu=True) for group, taken in waiting.items()]
    reading = [index for index in _outermost_reads(tree) if index not in over]
    found += [_wait(tree, i, tree.host[i].duration, for_gpu=False) for i in reading]
    over |= {above for index in reading for above in ancestors(index, tree.parents)}
    names = _READING_CALLS if steps.device else _READING_CALLS | _MOVING_CALLS
    for index, event in enumerate(tree.host):
        call = called(event, calls)
        if call and call.name in names and index not in over:
            found.append(Wait(call.name, event.start, event.duration, False, call, True))
    return sorted(found, key=lambda wait: wait.start)


class _Tree:
    """What the host did, and in which event each one lies."""

    def __init__(self, steps: Steps, calls: Sequence[Called]) -> None:
        self.host, self.calls = steps.host, calls
        self.parents = parents(steps.host)

    def above(self, index: int) -> Iterator[tuple[int, Event]]:
        """An event and those it lies in, innermost first."""
        return ((i, self.host[i]) for i in ancestors(index, self.parents))


def _waiting(tree: _Tree, steps: Steps) -> dict[int, float]:
    """The innermost operator around each call that waits, or that call, and the time that took."""
    pageable = {event.link for event in steps.device if "Pageable" in event.name}
    found: dict[int, float] = {}
    for index, event in enumerate(tree.host):
        if event.kind != CALL:
            continue
        if event.name in _WAITING or (event.link is not None and event.link in pageable):
            inside = (i for i, above in tree.above(index) if above.kind == OPERATOR)
            group = next(inside, index)
            found[group] = found.get(group, 0.0) + event.duration
    return found


def _outermost_reads(tree: _Tree) -> list[int]:
    """The operators that read a value, but for those that others of them, or fillings, read by."""
    found = []
    for index, event in enumerate(tree.host):
        if event.kind != OPERATOR or event.name not in _READING:
            continue
        around = {above.name for i, above in tree.above(index) if i != index}
        if not around & _READING and not (event.name in _VALUES and around & _FILLING):
            found.append(index)
    return found


def _wait(tree: _Tree, index: int, duration: float, *, for_gpu: bool) -> Wait:
    """A wait named by the outermost of PyTorch's operators that are around it without a break."""
    event = tree.host[index]
    cause = event.name
    for _, above in tree.above(index):
        if above.kind != OPERATOR or not above.name.startswith("aten::"):
            break
        cause = above.name
    return Wait(cause, event.start, duration, for_gpu, _called(tree, index))


def _called(tree: _Tree, index: int) -> Called:
    if (known := tree.host[index].called) is not None:
        return known
    for _, above in tree.above(index):
        if call := called(above, tree.calls):
            return call
    frames = (frame_line(above) for _, above in tree.above(index))
    return Called("", tuple(line for line in frames if line is not None))


def with_lines(timed: Sequence[Wait], marked: Sequence[Wait]) -> list[Wait] | None:
    """The waits of an undisturbed run, with the lines of a run of the same steps that had marks.

    What only marks show is added. None when the two runs did not wait for the same things in the
    same order: whose line is whose is then unknown.
    """
    shown = [wait for wait in marked if not wait.is_call]
    if [(w.cause, w.for_gpu) for w in timed] != [(w.cause, w.for_gpu) for w in shown]:
        return None
    named = [own._replace(called=other.called) for own, other in zip(timed, shown)]
    return named + [wait for wait in marked if wait.is_call]
