"""What a step did is told from what the profiler does before it and after it."""

from tests.exporter.trace.traces import call, kernel, mark, op, step, steps


def test_a_kernel_is_of_the_step_that_launched_it_whenever_it_runs() -> None:
    found = steps(
        call("cudaLaunchKernel", 1, 2, 1),
        step(10, 20),
        op("aten::mm", 11, 13),
        call("cudaLaunchKernel", 12, 13, 2),
        kernel("early", 14, 15, 1),
        kernel("late", 25, 30, 2),
        kernel("of no call", 15, 16, 9),
        kernel("of none, after it", 31, 32, 9),
        call("cudaDeviceSynchronize", 21, 30),
    )
    assert found.count == 1
    assert [event.name for event in found.host] == ["aten::mm", "cudaLaunchKernel"]
    assert [event.name for event in found.device] == ["of no call", "late"]


def test_the_steps_of_a_users_profiler_are_steps() -> None:
    found = steps(
        op("aten::ones", 0, 1),
        mark("ProfilerStep#2", 2, 4),
        mark("ProfilerStep#3", 4, 6),
        mark("another", 3, 4),
        op("aten::mm", 5, 6),
    )
    assert found.count == 2
    assert [event.name for event in found.host] == ["another", "aten::mm"]


def test_without_a_mark_all_of_a_trace_is_one_step() -> None:
    found = steps(op("aten::ones", 2, 3), kernel("k", 3, 9, 1))
    assert (found.count, found.windows[0].start, found.windows[0].end) == (1, 2, 9)
    assert len(found.host) == len(found.device) == 1
