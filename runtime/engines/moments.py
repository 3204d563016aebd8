"""A call of a moment where each moment has a session of its own: a graph, or a plan.

What a session does not write in place comes out of it: a state that it replaces with `NEXT` after
its name, and with `ROWS` what is new of one that keeps the rest.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from wanexport.runtime.arrays import Array
from wanexport.runtime.bundle.pinned_file import PinnedFile
from wanexport.runtime.engines.engine import Memory
from wanexport.runtime.program import NEXT, PLACE_OF_ROWS, ROWS, Program

Ends = Mapping[str, tuple[tuple[int, ...], str]]  # shape, and our name of the dtype


class Session(Protocol):
    """One opened graph."""

    inputs: Ends
    outputs: Ends

    def __call__(self, inputs: Mapping[str, Any]) -> list[Any]:
        """The outputs in order."""


def call_moment(
    program: Program,
    sessions: Mapping[str, Session],
    inputs: Mapping[str, Array],
    weights: PinnedFile | None,
    memory: Memory,
    moment: str,
) -> Any:
    """Run the graph of a moment, and before it that of the prompt where memory has nothing of it.

    Returns the velocity, None of a moment that gives none.
    """
    of_prompt = next((call for call in program.calls if call.when == "prompt"), None)
    if of_prompt is not None and (memory.values is None or memory.weights != weights):
        written = _run(sessions[of_prompt.name], inputs, memory)
        memory.values, memory.weights = written, weights
    call = program.at(moment)
    written = _run(sessions[call.name], {**inputs, **(memory.values or {})}, memory)
    return written[call.writes[0]] if call.writes else None


def _run(session: Session, inputs: Mapping[str, Array], memory: Memory) -> dict[str, Any]:
    """What a session gives by name, but for state, which memory has then."""
    results = dict(zip(session.outputs, session({**inputs, **memory.state}), strict=True))
    for name in [name for name in results if name.endswith(NEXT)]:
        memory.state[name.removesuffix(NEXT)] = results.pop(name)
    for name in [name for name in results if name.endswith(ROWS)]:
        state = memory.state[name.removesuffix(ROWS)]
        keep_rows(state, inputs[PLACE_OF_ROWS], results.pop(name))
    return results


def keep_rows(state: Any, slots: Any, rows: Any) -> None:
    """Write rows [1, R, ...] into a state [1, T, ...] of slots with R / len(slots) rows each.

    The arrays are numpy's or on one device, where the host waits for nothing.
    """
    shape = (1, -1, rows.shape[1] // len(slots), *rows.shape[2:])
    state.reshape(shape)[:, slots] = rows.reshape(shape)
