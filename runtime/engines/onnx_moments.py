"""What ONNX Runtime's sessions of one engine share: the ends of a graph, and a call of a moment.

ONNX writes nothing in place: a state is an input of a graph and, with `NEXT` after its name, an
output where it changes. What the graph's metadata names may have one address for both.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np

from wanexport.runtime.arrays import Array
from wanexport.runtime.bundle.pinned_file import PinnedFile
from wanexport.runtime.dtypes import DTYPES
from wanexport.runtime.engines.engine import Memory
from wanexport.runtime.errors import BundleError
from wanexport.runtime.program import NEXT, Program

WRITTEN = "wanexport.written_state"  # in a graph's metadata: the state that may be so written
Ends = Mapping[str, tuple[tuple[int, ...], str]]  # shape, and our name of the dtype
_DTYPES = {
    "tensor(float)": "fp32",
    "tensor(float16)": "fp16",
    "tensor(bfloat16)": "bf16",
    "tensor(int64)": "I64",
}


class Session(Protocol):
    """One opened graph."""

    inputs: Ends
    outputs: Ends

    def __call__(self, inputs: Mapping[str, Any]) -> list[Any]:
        """The outputs in order."""


def ends_of(session: Any) -> tuple[Ends, Ends]:
    """The inputs and the outputs of a session of ONNX Runtime's.

    Raises BundleError for a type that no engine has.
    """
    inputs, outputs = (
        {value.name: (tuple(value.shape), _dtype(value)) for value in values}
        for values in (session.get_inputs(), session.get_outputs())
    )
    return inputs, outputs


def _dtype(value: Any) -> str:
    if value.type not in _DTYPES:
        raise BundleError(
            f"the graph's {value.name} is a {value.type}, expected one of {', '.join(_DTYPES)}: "
            f"run wanexport build again"
        )
    return _DTYPES[value.type]


def written_state(session: Any) -> frozenset[str]:
    """The names of the state that a graph may write where it lies."""
    return frozenset(session.get_modelmeta().custom_metadata_map.get(WRITTEN, "").split())


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Numpy's dtype of ours."""
    return np.dtype(DTYPES[name].numpy)


def zeros_by_name(program: Program, sessions: Iterable[Session]) -> dict[str, Any]:
    """Shape and dtype of each state, as the graphs that take it have them."""
    ends = {name: end for session in sessions for name, end in session.inputs.items()}
    return {name: ends[name] for name in program.states()}


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
    """What a graph gives by name, but for state, which memory has then."""
    results = dict(zip(session.outputs, session({**inputs, **memory.state}), strict=True))
    for name in [name for name in results if name.endswith(NEXT)]:
        memory.state[name.removesuffix(NEXT)] = results.pop(name)
    return results
