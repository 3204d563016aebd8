"""Waits of the host: each once, with what caused it, how long it took, and its line."""

from dataclasses import dataclass

import pytest

from tests.exporter.trace.traces import HOST, call, item, kernel, mark, op, step, steps
from wanexport.exporter.trace.event import FRAME, Called, Event, Line
from wanexport.exporter.trace.waits import Wait, waits_of, with_lines


def brief(waits: list[Wait]) -> list[tuple[str, float, bool]]:
    return [(wait.cause, wait.duration, wait.for_gpu) for wait in waits]


def test_an_item_waits_once_for_copy_and_synchronisation() -> None:
    found = waits_of(steps(step(0, 100), *item(10, 1), *item(30, 2)))
    assert brief(found) == [("aten::item", 5, True)] * 2
    assert [wait.start for wait in found] == [11, 31]


def test_waits_of_the_profiler_and_after_the_steps_are_nobodys() -> None:
    outside = [
        call("cudaDeviceSynchronize", 0, 5),
        *item(6, 1),
        step(20, 40),
        op("aten::mm", 21, 22),
        call("cudaDeviceSynchronize", 41, 60),
    ]
    assert waits_of(steps(*outside)) == []


def test_launches_and_copies_from_pinned_memory_wait_for_nothing() -> None:
    found = waits_of(
        steps(
            step(0, 50),
            op("aten::mm", 1, 4),
            call("cudaLaunchKernel", 2, 3, 1),
            kernel("gemm", 5, 9, 1),
            op("aten::copy_", 5, 9),
            call("cudaMemcpyAsync", 6, 8, 2),
            kernel("Memcpy HtoD (Pinned -> Device)", 10, 11, 2),
            call("cudaEventRecord", 12, 13),
        )
    )
    assert found == []


@pytest.mark.parametrize(
    "name",
    ["cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cuCtxSynchronize"],
)
def test_a_bare_synchronisation_is_its_own_cause(name: str) -> None:
    assert brief(waits_of(steps(step(0, 9), call(name, 2, 6)))) == [(name, 4, True)]


def test_a_copy_from_pageable_memory_waits_even_where_nothing_synchronises() -> None:
    found = waits_of(
        steps(
            step(0, 50),
            op("aten::to", 1, 10),
            op("aten::_to_copy", 2, 9),
            op("aten::copy_", 3, 8),
            call("cudaMemcpyAsync", 4, 7, 3),
            kernel("Memcpy HtoD (Pageable -> Device)", 5, 8, 3),
        )
    )
    assert brief(found) == [("aten::to", 3, True)]


def test_two_masks_of_one_index_are_two_waits() -> None:
    parts = [
        part
        for at in (2, 12)
        for part in (op("aten::nonzero", at, at + 8), call("cudaStreamSynchronize", at + 1, at + 4))
    ]
    found = waits_of(steps(step(0, 50), op("aten::index", 1, 30), *parts))
    assert brief(found) == [("aten::index", 3, True)] * 2


def test_the_cause_is_within_what_is_no_operator_of_pytorchs() -> None:
    around = op("Torch-Compiled Region: 0/0", 0.5, 40)
    assert brief(waits_of(steps(step(0, 50), around, *item(10, 1)))) == [("aten::item", 5, True)]


def test_on_a_cpu_a_value_is_read_and_nothing_waits() -> None:
    found = waits_of(
        steps(
            step(0, 90),
            op("aten::is_nonzero", 1, 9),
            op("aten::item", 2, 8),
            op("aten::_local_scalar_dense", 3, 7),
            op("aten::index", 10, 20),
            op("aten::nonzero", 11, 12),
            op("aten::mm", 21, 22),
            op("aten::equal", 23, 24),
            op("aten::index_put_", 30, 40),  # x[mask] = 0.0
            op("aten::item", 31, 33),
            op("aten::index_put_", 50, 60),  # x[mask] = y
            op("aten::nonzero", 51, 53),
        )
    )
    assert brief(found) == [
        ("aten::is_nonzero", 8, False),
        ("aten::index", 1, False),
        ("aten::equal", 1, False),
        ("aten::index_put_", 2, False),
    ]


def test_a_read_on_the_host_is_told_from_a_wait_beside_it() -> None:
    found = waits_of(steps(step(0, 90), *item(10, 1), op("aten::item", 50, 52)))
    assert brief(found) == [("aten::item", 5, True), ("aten::item", 2, False)]


def calls_of(*names: str) -> list[Called]:
    return [Called(name, (Line("m.py", number, "f"),)) for number, name in enumerate(names)]


def test_a_mark_gives_the_line_of_what_lies_in_it() -> None:
    calls = calls_of("Tensor.item", "synchronize")
    found = waits_of(
        steps(
            step(0, 90),
            mark("wanexport line 0", 9, 21),
            *item(10, 1),
            mark("wanexport line 1", 30, 40),
            call("cudaDeviceSynchronize", 31, 39),
            mark("wanexport line 7", 41, 60),
            *item(42, 2),
        ),
        calls,
    )
    assert [wait.called for wait in found] == [*calls, Called("", ())]


def test_what_only_python_sees_is_a_read_of_its_own() -> None:
    calls = calls_of("Tensor.tolist", "Tensor.cpu", "torch.tensor", "Tensor.sin")
    marks = [mark(f"wanexport line {i}", 10 * i + 1, 10 * i + 5) for i in range(4)]
    on_cpu = waits_of(steps(step(0, 90), *marks), calls)
    assert [(w.cause, w.for_gpu, w.is_call) for w in on_cpu] == [
        (name, False, True) for name in ("Tensor.tolist", "Tensor.cpu", "torch.tensor")
    ]
    # Where there is a GPU, what moves waits or does not, and the trace shows it.
    gpu = [call("cudaLaunchKernel", 60, 61, 1), kernel("k", 62, 63, 1)]
    on_gpu = waits_of(steps(step(0, 90), *marks, *gpu), calls)
    assert [wait.cause for wait in on_gpu] == ["Tensor.tolist"]
    waiting = waits_of(steps(step(0, 90), marks[0], call("cudaStreamSynchronize", 2, 3)), calls)
    assert brief(waiting) == [("cudaStreamSynchronize", 1, True)]


def test_the_stacks_of_a_users_trace_name_the_function() -> None:
    frames = [
        Event(name, FRAME, start, 50 - start, HOST)
        for start, name in enumerate(
            ["run.py(3): main", "model.py(40): forward", "torch/_tensor.py(9): wrapped",
             "<built-in method item>"],
            1,
        )
    ]  # fmt: skip
    (wait,) = waits_of(steps(step(0, 90), *frames, *item(10, 1)))
    assert wait.called.lines == (
        Line("model.py", 40, "forward", is_call=False),
        Line("run.py", 3, "main", is_call=False),
    )


@dataclass
class Run:
    """The waits of a run, by cause and line."""

    causes: str
    line: int | None = None

    def waits(self) -> list[Wait]:
        found = []
        for at, cause in enumerate(self.causes):
            lines = (Line("m.py", 10 * at, "f"),) if self.line is not None else ()
            is_call = cause == "t"
            found.append(Wait(cause, at, 1 + at, True, Called("c", lines), is_call))
        return found


def test_the_lines_of_a_marked_run_are_those_of_an_undisturbed_one_that_waited_alike() -> None:
    named = with_lines(Run("abb").waits(), Run("abbt", 1).waits())
    assert named is not None
    assert [(wait.cause, wait.called.lines[0].number) for wait in named] == [
        ("a", 0), ("b", 10), ("b", 20), ("t", 30),
    ]  # fmt: skip
    assert with_lines(Run("abb").waits(), Run("abab", 1).waits()) is None
    assert with_lines(Run("abb").waits(), Run("ab", 1).waits()) is None
    assert with_lines(Run("abb").waits(), Run("bab", 1).waits()) is None
