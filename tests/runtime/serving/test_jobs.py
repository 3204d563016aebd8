"""Jobs that call back and are awaited: whatever a callback or a task does, the queue goes on."""

import asyncio
import gc
import threading
import time
import warnings
import weakref
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any

import pytest

from wanexport.runtime.errors import BadRequest, EngineFailure, WanExportWarning
from wanexport.runtime.serving.jobs import Check, Job, JobQueue

SECONDS = 3  # within which whatever is waited for comes, or the test fails


@pytest.fixture
def queue() -> Iterator[JobQueue]:
    """A queue whose thread is called `worker`."""
    opened = JobQueue("worker")
    yield opened
    opened.close()


class Gate:
    """Work that begins, waits until it is opened, and asks whether to stop before it is done."""

    def __init__(self, result: str = "done") -> None:
        self.result, self.begun, self.opened = result, threading.Event(), threading.Event()

    def __call__(self, check: Check) -> str:
        self.begun.set()
        assert self.opened.wait(SECONDS)
        check()
        return self.result


class Calls:
    """A callback that notes jobs and the threads that it was called in."""

    def __init__(self) -> None:
        self.jobs: list[Job[Any]] = []
        self.threads: list[str] = []

    def __call__(self, job: Job[Any]) -> None:
        assert job.done()
        self.jobs.append(job)
        self.threads.append(threading.current_thread().name)


def fail(check: Check) -> str:
    raise RuntimeError("boom")


def finish(queue: JobQueue) -> None:
    """Wait until the queue has done all that was submitted, callbacks included."""
    queue.submit(lambda check: None).result(SECONDS)


def test_a_callback_is_called_once_in_the_thread_that_works(queue: JobQueue) -> None:
    gate, calls = Gate(), Calls()
    job = queue.submit(gate)
    job.add_done_callback(calls)
    assert calls.jobs == []
    gate.opened.set()
    assert job.result(SECONDS) == "done"
    finish(queue)
    assert (calls.jobs, calls.threads) == ([job], ["worker"])


def test_a_callback_of_a_job_that_is_done_is_called_at_once(queue: JobQueue) -> None:
    job, calls = queue.submit(lambda check: 1), Calls()
    job.result(SECONDS)
    finish(queue)
    job.add_done_callback(calls)
    assert (calls.jobs, calls.threads) == ([job], [threading.current_thread().name])


def test_callbacks_are_called_in_the_order_that_they_were_added_in(queue: JobQueue) -> None:
    gate, order = Gate(), list[int]()
    job = queue.submit(gate)
    for number in range(5):
        job.add_done_callback(lambda _, number=number: order.append(number))  # type: ignore[misc]
    gate.opened.set()
    finish(queue)
    assert order == [0, 1, 2, 3, 4]


def test_every_end_of_a_job_calls_back(queue: JobQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object) -> None:
        raise MemoryError

    gate, calls = Gate(), Calls()
    running, failing, waiting, lost = (queue.submit(work) for work in (gate, fail, fail, fail))
    monkeypatch.setattr(lost, "_settle", no_memory)
    for job in (running, failing, waiting, lost):
        job.add_done_callback(calls)
    assert gate.begun.wait(SECONDS) and running.cancel() and waiting.cancel()
    here = threading.current_thread().name
    assert (calls.jobs, calls.threads) == ([waiting], [here])  # it never began
    gate.opened.set()
    finish(queue)
    assert (calls.jobs[1:], calls.threads[1:]) == ([running, failing, lost], ["worker"] * 3)
    with pytest.raises(EngineFailure):
        lost.result(SECONDS)


def test_closing_calls_back_too(queue: JobQueue) -> None:
    gate, calls = Gate(), Calls()
    jobs = [queue.submit(work) for work in (gate, fail)]
    for job in jobs:
        job.add_done_callback(calls)
    assert gate.begun.wait(SECONDS)
    threading.Timer(0.05, gate.opened.set).start()
    queue.close()
    assert sorted(map(id, calls.jobs)) == sorted(map(id, jobs))
    with pytest.raises(EngineFailure, match="closed"):
        queue.submit(fail)


class Vicious(Exception):
    """An error that cannot be told."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


ERRORS = [RuntimeError("two\nlines"), Vicious(), MemoryError(), SystemExit(), KeyboardInterrupt()]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_of_a_callback_is_a_warning_and_loses_nothing(
    error: BaseException, queue: JobQueue
) -> None:
    def raising(_: Job[str]) -> None:
        raise error

    gate, calls = Gate(), Calls()
    job = queue.submit(gate)
    job.add_done_callback(raising)
    job.add_done_callback(calls)
    with pytest.warns(WanExportWarning, match=type(error).__name__) as caught:
        gate.opened.set()
        finish(queue)
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    assert (job.result(), calls.jobs, calls.threads) == ("done", [job], ["worker"])
    assert queue.submit(lambda check: "next").result(SECONDS) == "next"


def test_a_warning_that_is_an_error_stops_no_queue(queue: JobQueue) -> None:
    def raising(_: Job[str]) -> None:
        raise RuntimeError

    gate, calls = Gate(), Calls()
    job = queue.submit(gate)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        job.add_done_callback(raising)
        job.add_done_callback(calls)
        gate.opened.set()
        finish(queue)
    assert calls.jobs == [job] and job.result() == "done"


def test_an_interrupt_of_who_cancels_is_not_swallowed(queue: JobQueue) -> None:
    def interrupt(_: Job[str]) -> None:
        raise KeyboardInterrupt

    gate, calls = Gate(), Calls()
    running, waiting = queue.submit(gate), queue.submit(fail)
    waiting.add_done_callback(interrupt)
    waiting.add_done_callback(calls)
    with pytest.raises(KeyboardInterrupt):
        waiting.cancel()
    assert waiting.done()
    gate.opened.set()
    finish(queue)
    assert running.result() == "done" and calls.jobs == [waiting]


def test_a_callback_may_submit_and_cancel_and_not_wait(queue: JobQueue) -> None:
    gate, told = Gate(), list[Any]()

    def call(job: Job[str]) -> None:
        told.append(job.cancel())  # too late: it has its result
        told.append(job.result())
        told.append(queue.submit(lambda check: "second"))
        with pytest.raises(BadRequest, match="cannot wait"):
            told[-1].result()

    job = queue.submit(gate)
    job.add_done_callback(call)
    gate.opened.set()
    finish(queue)
    assert told[:2] == [False, "done"] and told[2].result(SECONDS) == "second"


def test_a_callback_that_takes_long_holds_up_nobody_who_asks(queue: JobQueue) -> None:
    gate, called, go_on = Gate(), threading.Event(), threading.Event()

    def slow(_: Job[str]) -> None:
        called.set()
        assert go_on.wait(SECONDS)

    job = queue.submit(gate)
    job.add_done_callback(slow)
    gate.opened.set()
    assert called.wait(SECONDS)
    started = time.monotonic()
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(lambda: (job.result(), job.cancel())).result(SECONDS / 2)
    job.add_done_callback(lambda _: go_on.set())  # at once, of this thread
    assert go_on.is_set() and time.monotonic() - started < SECONDS / 2


def test_a_job_that_called_back_is_freed_with_its_last_reference(queue: JobQueue) -> None:
    class Result:
        pass

    gc.disable()
    try:
        job = queue.submit(lambda check: Result())
        job.add_done_callback(lambda job: None)
        asyncio.run(awaited(job))
        finish(queue)
        result = weakref.ref(job.result())
        del job
        assert result() is None
    finally:
        gc.enable()


async def awaited(job: Job[Any]) -> Any:
    return await job


def test_a_job_is_awaited() -> None:
    async def main(queue: JobQueue) -> list[str]:
        gates = [Gate(name) for name in ("one", "two")]
        jobs = [queue.submit(gate) for gate in gates]
        twice = asyncio.create_task(awaited(jobs[0]))
        asyncio.get_running_loop().call_later(0.01, gates[0].opened.set)
        gates[1].opened.set()
        return [*await asyncio.gather(*jobs), await twice, await jobs[0]]

    queue = JobQueue("worker")
    assert asyncio.run(main(queue)) == ["one", "two", "one", "one"]
    queue.close()


def test_loops_of_several_threads_await_one_job(queue: JobQueue) -> None:
    gate = Gate()
    job = queue.submit(gate)
    with ThreadPoolExecutor(4) as threads:
        answers = [threads.submit(asyncio.run, awaited(job)) for _ in range(4)]
        assert gate.begun.wait(SECONDS)
        gate.opened.set()
        assert [answer.result(SECONDS) for answer in answers] == ["done"] * 4


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("error", [RuntimeError, SystemExit, CancelledError])
def test_what_the_work_raised_is_raised_where_it_is_awaited(
    error: type[BaseException], done: bool, queue: JobQueue
) -> None:
    def work(check: Check) -> str:
        assert done or gate.opened.wait(SECONDS)
        raise error

    async def main() -> str:
        task = asyncio.current_task()
        asyncio.get_running_loop().call_later(0.01, gate.opened.set)
        try:
            return await job
        except error:
            assert task is not None and not task.cancelling()
            return "raised"

    gate = Gate()
    job = queue.submit(work)
    if done:
        finish(queue)
    assert asyncio.run(main()) == "raised"


def test_a_job_that_was_cancelled_does_not_cancel_the_task(queue: JobQueue) -> None:
    """`asyncio.CancelledError` would: it is how a task is told that it is cancelled itself."""

    async def main() -> None:
        for job in (waiting, running):
            task = asyncio.create_task(awaited(job))
            await asyncio.sleep(0)
            assert job.cancel()
            if job is running:
                first.opened.set()
            with pytest.raises(CancelledError):
                await task
            assert not task.cancelled()

    first = Gate()
    running, waiting = queue.submit(first), queue.submit(Gate())
    assert first.begun.wait(SECONDS)
    asyncio.run(main())
    finish(queue)


@pytest.mark.parametrize("how", ["cancel", "timeout"])
def test_cancelling_the_task_that_awaits_leaves_the_job_alone(how: str, queue: JobQueue) -> None:
    async def main() -> None:
        if how == "timeout":
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(job, 0.01)
        else:
            task = asyncio.create_task(awaited(job))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert not job.done() and job._callbacks == []
        gate.opened.set()
        assert await job == "done"

    gate = Gate()
    job = queue.submit(gate)
    asyncio.run(main())


def test_a_job_may_end_while_the_task_is_cancelled(queue: JobQueue) -> None:
    async def main() -> list[Any]:
        problems: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, told: problems.append(told))
        task = asyncio.create_task(awaited(job))
        await asyncio.sleep(0)
        gate.opened.set()
        finish(queue)  # by now the loop was told to wake the task
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0)
        return problems

    gate = Gate()
    job = queue.submit(gate)
    assert asyncio.run(main()) == [] and job.result() == "done"


def test_a_loop_that_is_gone_by_then_hurts_nobody(queue: JobQueue) -> None:
    gate = Gate()
    job = queue.submit(gate)
    loop = asyncio.new_event_loop()
    task = loop.create_task(awaited(job))
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gate.opened.set()
        assert job.result(SECONDS) == "done"
        finish(queue)
    assert not caught
    task._log_destroy_pending = False  # type: ignore[attr-defined]


def test_awaiting_in_the_thread_that_works_is_refused(queue: JobQueue) -> None:
    later: list[Job[str]] = []

    def work(check: Check) -> None:
        later.append(queue.submit(lambda check: "later"))
        asyncio.run(awaited(later[0]))

    with pytest.raises(BadRequest, match="cannot wait"):
        queue.submit(work).result(SECONDS)
    assert later[0].result(SECONDS) == "later"


def hammer(queue: JobQueue, number: int, counts: list[int]) -> None:
    def count(_: object, number: int = number) -> None:
        counts[number] += 1

    job = queue.submit(lambda check: number)
    job.add_done_callback(count)
    if number % 3 == 0:
        job.cancel()
    job.add_done_callback(count)


def test_no_callback_is_lost_or_repeated_whatever_thread_adds_it() -> None:
    numbers = range(600)
    counts, queue = [0] * len(numbers), JobQueue("worker", max_waiting=len(numbers))
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda number: hammer(queue, number, counts), numbers))
    finish(queue)
    queue.close()
    assert counts == [2] * len(numbers)
