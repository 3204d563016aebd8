"""Device buffers that the layers of a model use by turns: what is copied when, and what waits.

The order of work alone, without tensors: `Streams` are a device's, or a test's.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

Event = Any  # a moment of a stream: when all that it was given before has ended


class Streams(Protocol):
    """The caller's stream, which computes, and one that copies beside it."""

    def event(self) -> Event:
        """A moment that is yet to be recorded; who waits for it before waits for nothing."""

    def computing_records(self, event: Event) -> None:
        """Let an event be the moment that the computing stream has reached."""

    def computing_waits(self, event: Event) -> None:
        """Have the computing stream wait for an event; the host does not."""

    def copying_records(self, event: Event) -> None:
        """Let an event be the moment that the copying stream has reached."""

    def copying_waits(self, event: Event) -> None:
        """Have the copying stream wait for an event; the host does not."""

    def copying(self) -> AbstractContextManager[None]:
        """Give the copying stream what the block does."""


def spread(streamed: int, layers: int) -> list[int]:
    """Which of `layers` layers are streamed, as evenly apart as can be.

    Between two copies there is then the same computation to hide them behind, whatever the number
    of buffers.
    """
    return [i for i in range(layers) if (i + 1) * streamed // layers > i * streamed // layers]


class LayerRing:
    """Brings the layers of an order, over and over, into buffers by turns.

    `copy(layer, buffer)` gives the current stream the copy of a layer. A buffer is filled again as
    soon as the layer in it has computed, so that the first layers of the next round are there when
    it begins. One thread at a time; the computing streams of calls must follow one another.
    """

    def __init__(self, streams: Streams, copy: Callable[[int, int], None], buffers: int) -> None:
        self._streams, self._copy, self._buffers = streams, copy, buffers
        self._ready = [streams.event() for _ in range(buffers)]  # copied
        self._freed = [streams.event() for _ in range(buffers)]  # computed
        self._order: Sequence[int] = ()
        self._position = -1  # in the rounds, of the layer that comes next; -1 where none is there

    def arrange(self, order: Sequence[int]) -> None:
        """Stream these layers from now on, more than there are buffers; nothing is copied yet."""
        self._order, self._position = tuple(order), -1

    def start(self) -> None:
        """Fill the buffers with the first layers, each as soon as nothing computes with it."""
        if self._order:
            self._seek(self._order[0])

    def take(self, layer: int) -> int:
        """The buffer that holds a layer, once the computing stream comes to what it is given next.

        In an order other than the arranged one, or after an error, all buffers are filled anew.
        """
        if self._position < 0 or self._layer(self._position) != layer:
            self._seek(layer)
        buffer = self._position % self._buffers
        self._streams.computing_waits(self._ready[buffer])
        return buffer

    def release(self) -> None:
        """The layer that was taken last has been given to the computing stream: go on."""
        position, self._position = self._position, -1  # until the copy is under way
        self._streams.computing_records(self._freed[position % self._buffers])
        self._fill(position + self._buffers)
        self._position = position + 1

    def _layer(self, position: int) -> int:
        return self._order[position % len(self._order)]

    def _seek(self, layer: int) -> None:
        position = self._order.index(layer)
        self._position = -1  # until all copies are under way
        for ahead in range(self._buffers):
            self._fill(position + ahead)
        self._position = position

    def _fill(self, position: int) -> None:
        buffer = position % self._buffers
        self._streams.copying_waits(self._freed[buffer])
        with self._streams.copying():
            self._copy(self._layer(position), buffer)
        self._streams.copying_records(self._ready[buffer])
