"""The two runs of a profile: one for the times, one with a mark around each call for the lines."""

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch

from wanexport.exporter.backends.backend import Progress
from wanexport.exporter.profile.lines import Lines
from wanexport.exporter.profile.nodes import add_nodes
from wanexport.exporter.profile.subject import Profiled
from wanexport.exporter.trace.capture import capture, run
from wanexport.exporter.trace.chrome import Trace, events_of, write_lines
from wanexport.exporter.trace.steps import steps_of
from wanexport.exporter.trace.waits import Wait, waits_of, with_lines
from wanexport.runtime.errors import BadRequest, WanExportError, first_line


@dataclass(frozen=True)
class Recorded:
    """The trace of the undisturbed run, with what is known of lines, and its waits.

    `marked` are the waits of the other run, where the two did not wait for the same things.
    """

    trace: Trace
    waits: list[Wait]
    marked: list[Wait] | None
    nodes: int = 0  # of ONNX Runtime, that were added


def record(subject: Profiled, steps: int, warmup: int, progress: Progress) -> Recorded:
    """Run the steps. What they print goes to standard error.

    Raises BadRequest with the words of a step of the user's that fails, and when no step does
    anything that a profiler sees.
    """
    on_gpu = subject.device != "cpu" and torch.cuda.is_available()
    lines = Lines()
    with _running(subject), subject.within():
        for number in range(warmup):
            progress("warming up", number, warmup)
            run(subject.step)
        if on_gpu:
            torch.cuda.synchronize()
        progress("recording", 0, 0)
        trace = capture(subject.step, steps, on_gpu=on_gpu)
        progress("finding lines", 0, 0)
        with _not_compiling():
            marked = capture(
                subject.step, steps, on_gpu=on_gpu, shapes=False, within=lines.watching
            )
    nodes = add_nodes(trace, *subject.nodes.recorded_nodes()) if subject.nodes else 0
    waits = waits_of(steps_of(events_of(trace, subject.target)))
    seen = waits_of(steps_of(events_of(marked, subject.target)), lines.calls)
    named = with_lines(waits, seen)
    write_lines(trace, named or ())
    return Recorded(
        trace, waits if named is None else named, seen if named is None else None, nodes
    )


def _not_compiling() -> AbstractContextManager[Any]:
    """Have Dynamo run as Python what marks of lines would make it compile again."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("eager_on_recompile")
    return stance


@contextmanager
def _running(subject: Profiled) -> Iterator[None]:
    """Have what a step prints on standard error, and what it raises in one line."""
    try:
        with redirect_stdout(sys.stderr):
            yield
    except WanExportError:
        raise
    except (Exception, SystemExit) as error:
        raise BadRequest(
            f"a step of {subject.target} raised {type(error).__name__}: {first_line(error)}"
        ) from error
