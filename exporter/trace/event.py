"""One event of a profiler's trace, whatever recorded it. Times are microseconds."""

from typing import NamedTuple

# What an event is.
OPERATOR = "operator"  # of PyTorch, or a node of ONNX Runtime, on the host
CALL = "call"  # of CUDA's runtime or driver, on the host
DEVICE = "device"  # a kernel, a copy or a fill, on the GPU
MARK = "mark"  # a span that a program named
FRAME = "frame"  # a Python function

STEP = "wanexport step"  # the mark around each step that is profiled
ANYWHERE = ("", "")  # the place of an event that is of no one thread
NODE = "onnx::"  # how the name of ONNX Runtime's operators begins


class Line(NamedTuple):
    """A line of a file in which a function called something; `is_call` is False where only the
    line is known at which the function begins."""

    file: str
    number: int
    function: str
    is_call: bool = True

    def __str__(self) -> str:
        return f"{self.file}:{self.number}"


class Called(NamedTuple):
    """What Python called, as `Tensor.item`, and from where: the chain of lines, innermost first."""

    name: str
    lines: tuple[Line, ...]


UNKNOWN = Called("", ())


class Tensor(NamedTuple):
    """A tensor that an operator was given or made; strides None where they are unknown."""

    dtype: str  # as the profiler writes it: `c10::BFloat16`
    sizes: tuple[int, ...]
    strides: tuple[int, ...] | None = None


class Event(NamedTuple):
    """A span of time in which one thread of the host, or one stream of the GPU, did one thing.

    `link` is the number that a call and what it started on the GPU share, `operator` that of the
    operator, which its kernels have too. `given` has None for what is no tensor; `values` are the
    arguments as text, as far as they are known.
    """

    name: str
    kind: str
    start: float
    end: float
    place: tuple[str, str] = ANYWHERE  # process and thread, or GPU and stream
    link: int | None = None
    operator: int | None = None
    given: tuple[Tensor | None, ...] = ()
    made: tuple[Tensor, ...] = ()
    values: tuple[str, ...] = ()
    called: Called | None = None  # the line of Python, where somebody wrote it down

    @property
    def duration(self) -> float:
        """Microseconds."""
        return self.end - self.start
