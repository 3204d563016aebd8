"""Two ONNX models on the same inputs, in ONNX Runtime on a CPU."""

from pathlib import Path
from typing import Any

import numpy as np

from wanexport.runtime.engines.onnx import import_onnxruntime
from wanexport.runtime.errors import BundleError, first_line, printable

_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}


def compare(original: Path, rewritten: Path) -> tuple[str | None, str | None]:
    """What differs between the outputs of the two, if any does; and why nothing was compared.

    ONNX Runtime optimizes neither: it would round differently what it fuses in one of them.
    """
    try:
        runtime = import_onnxruntime()
    except BundleError as error:
        return None, str(error)
    try:
        first = _session(runtime, original)
        feeds = _feeds(first)
        expected = feeds if isinstance(feeds, str) else first.run(None, feeds)
    except Exception as error:  # of ONNX Runtime, whose exceptions have no other base
        return None, f"ONNX Runtime does not run the original: {printable(first_line(error), 200)}"
    if isinstance(feeds, str):
        return None, feeds
    del first
    try:
        found = _session(runtime, rewritten).run(None, feeds)
    except Exception as error:
        return f"ONNX Runtime does not run it: {printable(first_line(error), 200)}", None
    for i, (a, b) in enumerate(zip(expected, found)):
        if not _is_same(np.asarray(a), np.asarray(b)):
            return f"output {i} is not the same", None
    return None, None


def _session(runtime: Any, path: Path) -> Any:
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    return runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _feeds(session: Any) -> dict[str, np.ndarray] | str:
    """Random inputs, or why there are none."""
    rng = np.random.default_rng(0)
    feeds = {}
    for given in session.get_inputs():
        if given.type not in _DTYPES:
            return f"its input {given.name} is a {given.type}, which NumPy has not"
        if not all(isinstance(size, int) for size in given.shape):
            return f"the shape of its input {given.name} is not of numbers"
        dtype = _DTYPES[given.type]
        values = rng.standard_normal(given.shape) if np.issubdtype(dtype, np.floating) else None
        feeds[given.name] = (rng.integers(0, 2, given.shape) if values is None else values).astype(
            dtype
        )
    return feeds


def _is_same(a: np.ndarray, b: np.ndarray) -> bool:
    """Bit for bit, but for NaN."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    if not np.issubdtype(a.dtype, np.floating):
        return np.array_equal(a, b)
    return np.array_equal(a, b, equal_nan=True) and bool(
        (np.signbit(a) == np.signbit(b))[~np.isnan(a)].all()
    )
