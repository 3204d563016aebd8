"""One thread makes things, another one uses them up; an error of either ends both."""

import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any, Self

_AHEAD = 2  # things that were given and are not used up


class _GivenUp(BaseException):
    """Ends the user's thread when there comes no rest."""


class Handing:
    """Runs use(things) in a thread of its own, for the time of a `with` block, whose `give` hands
    it one thing after the other.

    The block ends when all are used up. Where it fails, the iterator of things raises in the other
    thread, and the block's error is raised once that thread has ended; where use fails, `give` or
    the block's end raises its error. What was given is kept until it is used up, and few wait.
    """

    def __init__(self, use: Callable[[Iterator[Any]], object], name: str) -> None:
        self._use = use
        self._things: SimpleQueue[tuple[Any] | None] = SimpleQueue()
        self._room = threading.Semaphore(_AHEAD)
        self._given_up = False
        self._error: BaseException | None = None
        # A daemon: who hands is waited for, and waits for it in turn.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def give(self, thing: Any) -> None:
        """Hand a thing over; waits while others wait. Raises what the user of things raised."""
        self._room.acquire()
        if self._error is not None:
            raise self._error
        self._things.put((thing,))

    def check(self) -> None:
        """For the user of things: raise where there comes no rest."""
        if self._given_up:
            raise _GivenUp

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            self._given_up = kind is not None
            self._things.put(None)
            self._thread.join()
        except BaseException:  # an interrupt of the wait
            self._given_up = True
            self._thread.join()
            raise
        if kind is None and self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._use(self._each())
        except _GivenUp:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._room.release()  # of whoever waits to give, and finds the error

    def _each(self) -> Iterator[Any]:
        """The things as they come. Raises in the place of the next when there comes no rest."""
        while True:
            given = self._things.get()
            self.check()
            if given is None:
                return
            yield given[0]
            del given  # its memory is free for the next
            self._room.release()
