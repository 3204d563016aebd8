"""Jobs that one thread runs in order, and that can be cancelled. Knows nothing of what they do."""

import threading
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import CancelledError, Future, InvalidStateError
from contextlib import suppress
from typing import Any, Generic, TypeVar

from wanexport.runtime.errors import BadRequest, EngineFailure, WanExportWarning, printable

MAX_WAITING = 64
T = TypeVar("T")
Outcome = TypeVar("Outcome")
Check = Callable[[], None]  # raises CancelledError when the job was cancelled


class Job(Generic[T]):
    """Work that was submitted: its result comes later.

    Wait for it with `result`, have it call back, or `await` it in an asyncio loop: any number of
    threads and tasks may. is_current tells whether the caller runs in the thread that does the
    work.
    """

    def __init__(self, is_current: Callable[[], bool]) -> None:
        self._is_current = is_current
        self._future: Future[T] = Future()
        self._stopped = False  # `cancel` has promised that there will be no result
        self._settled = False  # there is an outcome: `cancel` comes too late
        self._callbacks: list[Callable[[Job[T]], object]] = []
        self._lock = threading.RLock()  # a garbage collection inside it may close a queue

    def result(self, timeout: float | None = None) -> T:
        """Wait for the result, at most timeout seconds.

        Raises what the work raised, CancelledError when it was cancelled, TimeoutError when it is
        not done by then, and BadRequest inside the work of its queue, which it would wait for.
        """
        try:
            self._check_thread()
            return self._future.result(timeout)
        finally:
            del self  # an error keeps this frame, and the job keeps the error

    def __await__(self) -> Generator[Any, None, T]:
        """Wait in a task of any asyncio loop, and give or raise what `result` does.

        Cancelling the task, as `asyncio.wait_for` does at its timeout, leaves the job alone, for
        which others may wait: `cancel` stops it. A job that was cancelled raises CancelledError of
        `concurrent.futures`, as `result` does, which does not cancel the task.
        """
        import asyncio

        try:
            self._check_thread()
            loop = asyncio.get_running_loop()
            ended: asyncio.Future[None] = loop.create_future()

            def tell(_: Job[T]) -> None:
                with suppress(RuntimeError):  # in a loop that was closed nobody waits
                    loop.call_soon_threadsafe(_end, ended)

            self.add_done_callback(tell)
            try:
                yield from ended.__await__()
            finally:
                with self._lock, suppress(ValueError):  # of one that was called
                    self._callbacks.remove(tell)
            return self.result()
        finally:
            del self  # as in `result`

    def add_done_callback(self, call: "Callable[[Job[T]], object]") -> None:
        """Have call(job) called once when the job is done, in order; at once where it is done.

        It runs in the thread that ends the job: the pipeline's, whose next job waits for it, or
        that of who cancels a job that has not begun. It may submit, and cannot wait for another job
        of its pipeline. What it raises becomes a WanExportWarning, and changes nothing.
        """
        with self._lock:
            if not self.done():
                self._callbacks.append(call)
                return
        self._call(call)

    def cancel(self) -> bool:
        """Never begin the work, or stop it at its next check; whether it will have no result."""
        if not self._future.cancel():
            with self._lock:
                if not self._settled and not self.done():
                    self._stopped = True
                return self._stopped
        self._call_back()
        return True

    def done(self) -> bool:
        """Whether there is a result or an error, or the job was cancelled and has ended."""
        return self._future.done()

    def run(self, work: Callable[[Check], T]) -> None:
        """Do the work in this thread unless the job was cancelled; whatever it raises is kept."""
        if not self._future.set_running_or_notify_cancel():
            return
        try:
            result = work(self._check)
        except BaseException as error:
            with suppress(BaseException):  # lest the error be lost for the memory that it holds
                _drop_locals(error)
            self._settle(self._future.set_exception, error)
            del self, work  # the error keeps this frame, and must not keep what they hold
        else:
            self._settle(self._future.set_result, result)

    def end(self) -> None:
        """Call back, and end a job that would have no outcome, with an error: nobody waits for
        ever."""
        with suppress(InvalidStateError):  # of a job that has ended
            self._future.set_exception(
                EngineFailure("the request was lost when its pipeline failed: put it again")
            )
        self._call_back()

    def _check(self) -> None:
        if self._stopped:
            raise CancelledError

    def _check_thread(self) -> None:
        """Raise BadRequest in the thread that does the work, where waiting would never end."""
        if self._is_current() and not self.done():
            raise BadRequest(
                "a callback cannot wait for another request of its own pipeline: use submit"
            )

    def _settle(self, keep: Callable[[Outcome], None], outcome: Outcome) -> None:
        """Keep the outcome, unless `cancel` has promised that there will be none."""
        with self._lock:
            self._settled = True
        if self._stopped:
            self._future.set_exception(CancelledError())
        else:
            keep(outcome)

    def _call_back(self) -> None:
        """Call what was added and has not been called; each once, whoever calls this."""
        while True:
            with self._lock:
                if not self._callbacks:
                    return
                call = self._callbacks.pop(0)
            self._call(call)

    def _call(self, call: "Callable[[Job[T]], object]") -> None:
        try:
            call(self)
        except BaseException as error:
            if not isinstance(error, Exception) and not self._is_current():
                raise  # an interrupt of the thread that cancels
            reason = printable(traceback.format_exception_only(error)[-1].strip())
            with suppress(Exception):  # of a filter that makes it an error, which nobody catches
                warnings.warn(
                    f"a callback of a request failed ({reason}): the request is done all the same",
                    WanExportWarning,
                    stacklevel=2,
                )


def _end(waiting: Any) -> None:
    """Wake the task that waits for an asyncio future, unless it was cancelled meanwhile."""
    if not waiting.done():
        waiting.set_result(None)


def _drop_locals(error: BaseException) -> None:
    """Free what the frames of its tracebacks hold: latents, as long as anyone keeps the error."""
    errors: list[BaseException | None] = [error]
    done = set()  # an error may be its own cause
    while errors:
        one = errors.pop()
        if one is not None and id(one) not in done:
            done.add(id(one))
            traceback.clear_frames(one.__traceback__)
            errors += [one.__cause__, one.__context__]
            errors += one.exceptions if isinstance(one, BaseExceptionGroup) else ()


class JobQueue:
    """One thread that runs what is submitted, in order, until the queue is closed.

    At most max_waiting jobs wait; a job that was cancelled does not count.
    Raises BadRequest when that is no whole number of 1 or more.
    """

    def __init__(self, name: str, max_waiting: int = MAX_WAITING) -> None:
        if isinstance(max_waiting, bool) or not isinstance(max_waiting, int) or max_waiting < 1:
            raise BadRequest(f"max_waiting is {max_waiting!r}: expected 1 or more")
        self._max_waiting = max_waiting
        self._waiting: deque[tuple[Job[Any], Callable[[Check], Any]]] = deque()
        self._running: Job[Any] | None = None
        self._closed = False
        self._changed = threading.Condition()
        # A daemon, lest the interpreter wait for it before it lets anyone call `close`.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[Check], T]) -> Job[T]:
        """Queue the work, which is called with the function that it should check now and then.

        Raises EngineFailure when the queue is closed or full, and in a process that was forked.
        """
        job: Job[T] = Job(self.is_current)
        with self._changed:
            if self._closed:
                raise EngineFailure("the pipeline is closed: open another one")
            if not self._thread.is_alive():
                raise EngineFailure(
                    "the pipeline's thread is not in this process, which was forked: open a "
                    "pipeline where it is used"
                )
            self._check_room()
            self._waiting.append((job, work))
            self._changed.notify()
        return job

    def _check_room(self) -> None:
        """Raise EngineFailure when as many jobs wait as may."""
        if len(self._waiting) < self._max_waiting:
            return
        self._waiting = deque(pair for pair in self._waiting if not pair[0].done())
        if len(self._waiting) >= self._max_waiting:
            raise EngineFailure(
                f"{self._max_waiting} requests wait already: try again when one is done (a server "
                f"answers 503), or open the pipeline with a larger max_waiting"
            )

    def is_current(self) -> bool:
        """Whether the caller runs in the queue's thread, where waiting for a job never ends."""
        return threading.current_thread() is self._thread

    def close(self) -> None:
        """Take no more jobs, cancel those there are, and wait until the running one has stopped.

        From the queue's own thread it waits for nothing.
        """
        with self._changed:
            self._closed = True
            jobs = [job for job, _ in self._waiting]
            self._waiting.clear()
            if self._running is not None:
                jobs.append(self._running)
            self._changed.notify()
        for job in jobs:
            job.cancel()
        if not self.is_current():
            self._thread.join()

    def _run(self) -> None:
        try:
            while self._run_next():
                pass
        finally:  # of a thread that fails, too: whoever waits is told
            with self._changed:
                self._closed = True
                lost = [job for job, _ in self._waiting]
                self._waiting.clear()
            for job in lost:
                job.end()

    def _run_next(self) -> bool:
        """Run one job; in a frame of its own, so that waiting keeps nothing of the last one."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            if not self._waiting:
                return False
            self._running, work = self._waiting.popleft()
            job = self._running
        try:
            job.run(work)
        except BaseException:  # of keeping the outcome, as want of memory: the queue goes on
            pass
        finally:
            job.end()
            del job, work  # an error keeps this frame too, which called where it was raised
        with self._changed:
            self._running = None
        return True
