"""Jobs that one thread runs in order, and that can be cancelled. Knows nothing of what they do."""

import threading
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, InvalidStateError
from contextlib import suppress
from typing import Any, Generic, TypeVar

from wanexport.runtime.errors import WanExportError

MAX_WAITING = 64
T = TypeVar("T")
Outcome = TypeVar("Outcome")
Check = Callable[[], None]  # raises CancelledError when the job was cancelled


class Job(Generic[T]):
    """Work that was submitted: its result comes later.

    is_current tells whether the caller runs in the thread that does the work.
    """

    def __init__(self, is_current: Callable[[], bool]) -> None:
        self._is_current = is_current
        self._future: Future[T] = Future()
        self._stopped = False
        self._lock = threading.RLock()  # a garbage collection inside it may close a queue

    def result(self, timeout: float | None = None) -> T:
        """Wait for the result, at most timeout seconds.

        Raises what the work raised, CancelledError when it was cancelled, TimeoutError when it is
        not done by then, and WanExportError inside the work of its queue, which it would wait for.
        """
        if self._is_current() and not self.done():
            raise WanExportError(
                "on_step cannot wait for another request of its own pipeline: use submit"
            )
        try:
            return self._future.result(timeout)
        finally:
            del self  # an error keeps this frame, and the job keeps the error

    def cancel(self) -> bool:
        """Never begin the work, or stop it at its next check; whether it will have no result."""
        with self._lock:
            if not self._future.cancel() and not self._future.done():
                self._stopped = True
            return self._stopped or self._future.cancelled()

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

    def abandon(self) -> None:
        """End a job that would have no outcome, with an error, so that nobody waits for ever."""
        with suppress(InvalidStateError):  # of a job that has ended
            self._future.set_exception(
                WanExportError("the request was lost when its pipeline failed: put it again")
            )

    def _check(self) -> None:
        if self._stopped:
            raise CancelledError

    def _settle(self, keep: Callable[[Outcome], None], outcome: Outcome) -> None:
        """Keep the outcome, unless `cancel` has promised that there will be none."""
        with self._lock:
            if self._stopped:
                self._future.set_exception(CancelledError())
            else:
                keep(outcome)


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
    Raises WanExportError when that is no whole number of 1 or more.
    """

    def __init__(self, name: str, max_waiting: int = MAX_WAITING) -> None:
        if isinstance(max_waiting, bool) or not isinstance(max_waiting, int) or max_waiting < 1:
            raise WanExportError(f"max_waiting is {max_waiting!r}: expected 1 or more")
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

        Raises WanExportError when the queue is closed or full, and in a process that was forked.
        """
        job: Job[T] = Job(self.is_current)
        with self._changed:
            if self._closed:
                raise WanExportError("the pipeline is closed: open another one")
            if not self._thread.is_alive():
                raise WanExportError(
                    "the pipeline's thread is not in this process, which was forked: open a "
                    "pipeline where it is used"
                )
            self._check_room()
            self._waiting.append((job, work))
            self._changed.notify()
        return job

    def _check_room(self) -> None:
        """Raise WanExportError when as many jobs wait as may."""
        if len(self._waiting) < self._max_waiting:
            return
        self._waiting = deque(pair for pair in self._waiting if not pair[0].done())
        if len(self._waiting) >= self._max_waiting:
            raise WanExportError(
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
                job.abandon()

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
            job.abandon()
            del job, work  # an error keeps this frame too, which called where it was raised
        with self._changed:
            self._running = None
        return True
