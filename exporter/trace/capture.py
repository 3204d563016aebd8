"""Record steps with PyTorch's profiler, as a Chrome trace in memory."""

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NoReturn
from unittest.mock import patch

from wanexport.exporter.trace.chrome import Trace, read_trace
from wanexport.exporter.trace.event import STEP
from wanexport.runtime.errors import BadRequest
from wanexport.runtime.machine.temporary import marked_folder


def capture(
    step: Callable[[], Any],
    steps: int,
    *,
    on_gpu: bool,
    shapes: bool = True,
    within: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Trace:
    """Run steps, one after another as a sampling loop does, and return what was recorded of them.

    shapes records the sizes of operators' tensors. within is entered around each step. The wait for
    the GPU after the last one is in no step.
    Raises BadRequest when a step opens a profiler itself.
    """
    import torch
    from torch._C._profiler import _ExperimentalConfig
    from torch.profiler import ProfilerActivity, profile, record_function

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    config = _ExperimentalConfig(profile_all_threads=True)  # those that a step starts, too
    with profile(
        activities=activities, record_shapes=shapes, experimental_config=config
    ) as profiler:
        with _no_other_profiler():
            for _ in range(steps):
                with record_function(STEP), within():
                    run(step)
        if on_gpu:
            torch.cuda.synchronize()
    with marked_folder() as folder:
        path = folder / "trace.json"
        profiler.export_chrome_trace(str(path))
        return read_trace(path)


@contextmanager
def _no_other_profiler() -> Iterator[None]:
    """Refuse a profiler within this one, of which PyTorch ends the process with a segmentation
    fault."""
    from torch import autograd, profiler

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise BadRequest(
            "a step opens PyTorch's profiler, which runs already: expected a model without one; "
            "take torch.profiler out of it"
        )

    with ExitStack() as stack:
        stack.enter_context(patch.object(profiler.profile, "start", refuse))
        stack.enter_context(patch.object(autograd.profiler.profile, "__enter__", refuse))
        yield


def run(step: Callable[[], Any]) -> None:
    """Run a step; of a generator all that it yields, for what it does is done only then."""
    result = step()
    if isinstance(result, Generator):
        for _ in result:
            pass
