"""What ONNX Runtime's sessions of one engine share: the ends of a graph, and its state.

ONNX writes nothing in place: a state is an input of a graph and, with `NEXT` after its name, an
output where it changes. What the graph's metadata names may have one address for both.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from wanexport.runtime.dtypes import DTYPES
from wanexport.runtime.engines.moments import Ends, Session
from wanexport.runtime.errors import BundleError
from wanexport.runtime.program import Program

WRITTEN = "wanexport.written_state"  # in a graph's metadata: the state that may be so written
_DTYPES = {
    "tensor(float)": "fp32",
    "tensor(float16)": "fp16",
    "tensor(bfloat16)": "bf16",
    "tensor(int64)": "I64",
}


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
