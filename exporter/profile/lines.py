"""Which line of Python each call of PyTorch comes from, as marks in a profiler's trace.

PyTorch's own stacks name the line at which a function begins. Here each call is seen as it is made,
by a TorchFunctionMode: `x.item()`, `bool(x)`, `x[mask]`, `print(x)`. What reaches the GPU by other
ways, as `torch.cuda.synchronize()` and other libraries do, is seen by Python's profiling hook.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.profiler import record_function

from wanexport.exporter.trace.event import Called, Line
from wanexport.exporter.trace.lines import mark_name, shown

_MOST_LINES = 8  # of a chain of calls
_TORCH = str(Path(torch.__file__).parent) + "/"
_CAPTURE = str(Path(__file__).parents[1] / "trace" / "capture.py")
_SYNCHRONISING = {"synchronize", "_cuda_synchronize", "_accelerator_synchronizeDevice"}
_KNOWN = {*sys.stdlib_module_names, "torch", "numpy"}  # whose functions wait by PyTorch alone


class Lines:
    """The calls that were seen, each once, in the order in which a mark first named it."""

    def __init__(self) -> None:
        self._places: dict[Called, int] = {}

    @property
    def calls(self) -> list[Called]:
        """What marks name, by their number."""
        return list(self._places)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Mark every call of PyTorch in this thread, while the block lasts."""
        before = sys.getprofile()
        mode = _mode(self)
        with mode:
            sys.setprofile(_hook(self))
            try:
                yield
            finally:
                sys.setprofile(before)

    def mark(self, name: str, frame: FrameType | None) -> Any:
        """A mark of a call from a frame, to be entered."""
        called = Called(name, _chain(frame))
        return record_function(mark_name(self._places.setdefault(called, len(self._places))))


def _chain(frame: FrameType | None) -> tuple[Line, ...]:
    """The lines that led to a call: none of PyTorch's, nor what is outside the step."""
    lines: list[Line] = []
    while frame is not None and len(lines) < _MOST_LINES:
        file = frame.f_code.co_filename
        if file == _CAPTURE:  # it runs the step
            break
        if not file.startswith((_TORCH, "<frozen ")) and file != __file__:
            lines.append(Line(shown(file), frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    return tuple(lines)


def _mode(lines: Lines) -> TorchFunctionMode:
    def handle(
        self: Any, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        with lines.mark(_name(func, kwargs), sys._getframe(1)):
            return func(*args, **(kwargs or {}))

    # Dynamo would trace into it; without Dynamo the import of it would take seconds.
    if "torch._dynamo" in sys.modules:
        handle = torch.compiler.disable(handle)
    members = {"__torch_function__": handle}
    mode: TorchFunctionMode = type("LineMode", (TorchFunctionMode,), members)()
    return mode


def _name(func: Any, kwargs: Any) -> str:
    """A function of PyTorch as people write it: `Tensor.item`, `torch.tensor`."""
    name = str(getattr(func, "__name__", func))
    if name in ("tensor", "as_tensor") and getattr(torch, name) is func:
        moved = bool(kwargs) and kwargs.get("device") is not None
        return f"torch.{name}" if moved else f"torch.{name} in place"
    return f"Tensor.{name}" if hasattr(torch.Tensor, name) else f"torch.{name}"


def _hook(lines: Lines) -> Callable[[FrameType, str, Any], None]:
    """Python's profiling hook: it marks calls of compiled code that may wait for the GPU."""
    marks: list[tuple[Any, Any]] = []

    def hook(frame: FrameType, event: str, function: Any) -> None:
        if event == "c_call" and _may_wait(function) and frame.f_code.co_filename != __file__:
            mark = lines.mark(str(function.__name__), frame)
            mark.__enter__()
            marks.append((function, mark))
        elif event in ("c_return", "c_exception") and marks and marks[-1][0] == function:
            marks.pop()[1].__exit__(None, None, None)

    return hook


def _may_wait(function: Any) -> bool:
    if getattr(function, "__name__", "") in _SYNCHRONISING:
        return True
    module = getattr(function, "__module__", None) or ""
    return bool(module) and module.partition(".")[0] not in _KNOWN
