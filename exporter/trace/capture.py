"""Record steps with PyTorch's profiler, as a Chrome trace in memory."""

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from wanexport.exporter.trace.chrome import Trace, read_trace
from wanexport.exporter.trace.event import STEP
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
    """
    import torch
    from torch._C._profiler import _ExperimentalConfig
    from torch.profiler import ProfilerActivity, profile, record_function

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    config = _ExperimentalConfig(profile_all_threads=True)  # those that a step starts, too
    with profile(
        activities=activities, record_shapes=shapes, experimental_config=config
    ) as profiler:
        for _ in range(steps):
            with record_function(STEP), within():
                run(step)
        if on_gpu:
            torch.cuda.synchronize()
    with marked_folder() as folder:
        path = folder / "trace.json"
        profiler.export_chrome_trace(str(path))
        return read_trace(path)


def run(step: Callable[[], Any]) -> None:
    """Run a step; of a generator all that it yields, for what it does is done only then."""
    result = step()
    if isinstance(result, Generator):
        for _ in result:
            pass
