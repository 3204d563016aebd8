"""Which latent frames of a causal video are attended to, and in which slots of the cache they lie.

The rules are those of the official codes (guandeh17/Self-Forcing `wan/modules/causal_model.py`),
which keep a list of frames and move it in memory. Here a frame stays in its slot: its keys hold its
absolute place in the video, so the order of slots means nothing.
"""

from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import accumulate
from numbers import Integral

from wanexport.runtime.causal_wan import MAX_FRAMES
from wanexport.runtime.errors import BadRequest, printable


@dataclass(frozen=True)
class Window:
    """Which latent frames of a video stay, and which of them are attended to.

    The first `sink` and the latest stay, `size` in all, or every one where size is None. Of these
    the last `max_attention` are attended to, or all where that is None: fewer than the window lose
    the sink, as in the official code.
    """

    size: int | None = None
    sink: int = 0
    max_attention: int | None = None

    def check(self, chunk: int, cache: int) -> None:
        """Raise BadRequest when an engine of this chunk and cache, in frames, cannot keep to it."""
        for name, least in (("window", 1), ("sink", 0), ("max_attention", 1)):
            _check_whole(name, getattr(self, name.replace("window", "size")), least)
        if self.size is None and self.sink:
            raise BadRequest(
                f"a sink of {self.sink} frames means nothing without a window, where all stay: "
                f"give a window too"
            )
        if self.size is not None and self.size < self.sink + chunk:
            raise BadRequest(
                f"a window of {self.size} frames does not hold a sink of {self.sink} and a chunk "
                f"of {chunk}: give {self.sink + chunk} or more"
            )
        limits = [limit for limit in (self.size, self.max_attention) if limit is not None]
        if limits and min(limits) > cache:
            raise BadRequest(
                f"{min(limits)} frames would be attended to, and the engine's cache holds {cache}: "
                f"give a smaller window, or build an engine with --cache {min(limits)}"
            )

    def with_chunk(self, kept: Sequence[int], own: Sequence[int]) -> tuple[int, ...]:
        """The frames that are kept once a chunk, own, has come to those before, in order."""
        over = 0 if self.size is None else max(0, len(kept) + len(own) - self.size)
        return (*kept[: self.sink], *kept[self.sink + over :], *own)

    def attended(self, kept: Sequence[int]) -> tuple[int, ...]:
        """Those of the kept frames that are read."""
        return tuple(kept if self.max_attention is None else kept[-self.max_attention :])


def _check_whole(name: str, value: object, least: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise BadRequest(
            f"{name} is {printable(value, 40)}: expected a whole number of latent frames, {least} "
            f"or more"
        )


@dataclass(frozen=True)
class Place:
    """Where a chunk lies: the number of its first frame, a slot for each frame that a call takes,
    and the frames that it sees, which lie in as many first slots."""

    position: int
    slots: tuple[int, ...]
    attended: tuple[int, ...]


class KeptFrames:
    """The frames of one video in the slots of an engine's cache, chunk by chunk.

    `begin` gives a chunk its place, as often as is wanted, and `commit` keeps the last one begun.
    The slot of the number `cache` is for frames that nobody sees. `chunk` is how many frames a call
    takes, which a shorter chunk does not fill.
    """

    def __init__(self, window: Window, *, chunk: int, cache: int) -> None:
        window.check(chunk, cache)
        self.window, self.chunk, self.cache = window, chunk, cache
        self.position = 0  # of the next frame
        self._sizes: list[int] = []  # of the chunks that were committed
        self._kept: tuple[int, ...] = ()  # the list of the official code
        self._slots: dict[int, int] = {}  # frame -> slot, of what lies in the cache
        self._begun = 0  # frames of the chunk that was begun last

    @property
    def frames(self) -> tuple[int, ...]:
        """The committed frames whose keys and values lie in the cache."""
        return tuple(sorted(frame for frame in self._slots if frame < self.position))

    def begin(self, count: int) -> Place:
        """The place of the next chunk, of count frames; what it does not see is gone from then on.

        Raises BadRequest when the chunk is empty or too long, the cache or the table of angles
        ends, or a longer chunk, begun here before, has taken the place of frames that this one
        sees.
        """
        self._check_count(count)
        own = range(self.position, self.position + count)
        attended = self._seen_by(self._kept, own)
        slots = {frame: self._slots[frame] for frame in attended if frame not in own}
        free = iter(sorted(set(range(self.cache)) - set(slots.values())))
        slots |= {frame: next(free) for frame in attended if frame in own}
        self._slots, self._begun = slots, count
        of_own = [slots.get(frame, self.cache) for frame in own]
        of_none = [self.cache] * (self.chunk - count)
        return Place(self.position, (*of_own, *of_none), attended)

    def commit(self) -> None:
        """Keep the chunk that was begun last. Raises BadRequest where there is none."""
        if not self._begun:
            raise BadRequest("no chunk was begun since the last commit: there is none to keep")
        self._kept = self.window.with_chunk(self._kept, self._own(self._begun))
        self._sizes.append(self._begun)
        self.position += self._begun
        self._begun = 0

    def check_room(self, sizes: Iterable[int]) -> None:
        """Raise BadRequest, as `begin` does, unless chunks of so many frames each can follow."""
        trial = copy(self)
        trial._sizes = list(self._sizes)
        for count in sizes:
            trial.begin(count)
            trial.commit()

    def rewind(self, frames: int) -> None:
        """Go back by whole chunks, of so many frames together, and drop a chunk that was begun.

        Raises BadRequest when chunks do not end there, and when frames that a chunk there would see
        are gone; all is then as before.
        """
        ends = [0, *accumulate(reversed(self._sizes))]
        if isinstance(frames, bool) or not isinstance(frames, Integral) or frames not in ends:
            raise BadRequest(
                f"cannot rewind by {printable(frames, 40)} frames, which is not where a chunk "
                f"begins: expected {_few(ends)}"
            )
        sizes = self._sizes[: len(self._sizes) - ends.index(int(frames))]
        position, kept = 0, tuple[int, ...]()
        for count in sizes:
            kept = self.window.with_chunk(kept, range(position, position + count))
            position += count
        self._seen_by(kept, range(position, position + self.chunk))
        self._sizes, self._kept, self.position, self._begun = sizes, kept, position, 0
        self._slots = {frame: slot for frame, slot in self._slots.items() if frame < position}

    def _own(self, count: int) -> range:
        return range(self.position, self.position + count)

    def _seen_by(self, kept: Sequence[int], own: range) -> tuple[int, ...]:
        """The frames that a chunk sees, its own among them, which are all there."""
        attended = self.window.attended(self.window.with_chunk(kept, own))
        if len(attended) > self.cache:
            raise BadRequest(
                f"the engine's cache of {self.cache} frames is full at frame {own.start}: give a "
                f"window, or build an engine with a larger --cache"
            )
        gone = [frame for frame in attended if frame not in own and frame not in self._slots]
        if gone:
            raise BadRequest(
                f"a chunk of {len(own)} frames at frame {own.start} would see frame {gone[0]}, "
                f"whose slot another chunk has taken: begin the video again (reset)"
            )
        return attended

    def _check_count(self, count: int) -> None:
        if not 1 <= count <= self.chunk:
            raise BadRequest(f"a chunk has {count} frames: this engine takes 1 to {self.chunk}")
        if self.position + count > MAX_FRAMES:
            raise BadRequest(
                f"the video ends after {MAX_FRAMES} latent frames, as the model's table of "
                f"positions does, and {self.position} are there: begin another one (reset)"
            )


def _few(numbers: Sequence[int]) -> str:
    """Numbers in words, the first few of many."""
    return ", ".join(map(str, numbers[:4])) + (", ..." if len(numbers) > 4 else "")
