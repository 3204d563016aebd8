"""Streams of a GPU, simulated: work runs later, in any order that events and streams allow.

CUDA's rules (programming guide, "Streams" and "Events"): the work of one stream runs in its order;
a wait is for what was recorded last when it was called, and for nothing where nothing was.
"""

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

Work = Callable[[], None]
COPYING = "copying"


@dataclass
class Event:
    """What was recorded last: how often it was, and how often that has come."""

    recorded: int = 0
    come: int = 0


@dataclass
class Simulated:
    """The streams that a ring of layers uses; `current` is the caller's, by name.

    A piece of work begins and ends at different moments: `begin` may look at what runs beside it.
    """

    random: random.Random
    current: str = "caller"
    queues: dict[str, deque[tuple[str, Event | None, int, tuple[Work, Work] | None]]] = field(
        default_factory=dict
    )
    running: dict[str, Work] = field(default_factory=dict)  # what ends the work of a stream

    def event(self) -> Event:
        return Event()

    def computing_records(self, event: Event) -> None:
        self._record(self.current, event)

    def computing_waits(self, event: Event) -> None:
        self._wait(self.current, event)

    def copying_records(self, event: Event) -> None:
        self._record(COPYING, event)

    def copying_waits(self, event: Event) -> None:
        self._wait(COPYING, event)

    @contextmanager
    def copying(self) -> Iterator[None]:
        before, self.current = self.current, COPYING
        try:
            yield
        finally:
            self.current = before

    def host_waits(self, event: Event) -> None:
        self.run(until=lambda: event.come >= event.recorded)

    def host_waits_for_copies(self) -> None:
        self.run(until=lambda: not self._queue(COPYING) and COPYING not in self.running)

    def work(self, begin: Work, end: Work) -> None:
        """Give the current stream a piece of work."""
        self._queue(self.current).append(("work", None, 0, (begin, end)))

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        """Let the streams go on, in a random order, until something is so, or all has run."""
        while not until() and (able := [s for s in self.queues if self._able(s)]):
            self._step(self.random.choice(able))
        assert until() or not any(self.queues.values()), "the streams wait for one another"

    def _queue(self, stream: str) -> deque[tuple[str, Event | None, int, tuple[Work, Work] | None]]:
        return self.queues.setdefault(stream, deque())

    def _record(self, stream: str, event: Event) -> None:
        event.recorded += 1
        self._queue(stream).append(("record", event, event.recorded, None))

    def _wait(self, stream: str, event: Event) -> None:
        self._queue(stream).append(("wait", event, event.recorded, None))

    def _able(self, stream: str) -> bool:
        if stream in self.running:
            return True
        if not self.queues[stream]:
            return False
        kind, event, count, _ = self.queues[stream][0]
        return kind != "wait" or (event is not None and event.come >= count)

    def _step(self, stream: str) -> None:
        if stream in self.running:
            self.running.pop(stream)()
            return
        kind, event, count, work = self.queues[stream].popleft()
        if kind == "record" and event is not None:
            event.come = max(event.come, count)
        if work is not None:
            begin, self.running[stream] = work
            begin()
