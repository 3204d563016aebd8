"""Which frames a chunk sees, against the official code's bookkeeping run literally on a list."""

import random
from collections.abc import Iterator
from itertools import product

import pytest

from wanexport.runtime.causal_wan import MAX_FRAMES
from wanexport.runtime.errors import BadRequest
from wanexport.runtime.kept_frames import KeptFrames, Place, Window

CHUNKS = 44


class OfficialCache:
    """`CausalWanSelfAttention`'s cache of one layer, its tokens being frame numbers.

    One frame is one token. Names and order of work are the official code's; with size None nothing
    is ever moved. `read` is what attention is given.
    """

    def __init__(self, size: int | None, sink: int, max_attention: int | None) -> None:
        self.size, self.sink = size, sink
        capacity = MAX_FRAMES + 8 if size is None else size
        self.memory: list[int | None] = [None] * capacity
        self.max_attention = capacity if max_attention is None else max_attention
        self.global_end = self.local_end = 0

    def forward(self, start: int, count: int) -> list[int | None]:
        """One forward of a chunk: its tokens are written, and what is read is returned."""
        current_end = start + count
        full = self.size is not None and current_end > self.global_end
        if full and count + self.local_end > len(self.memory):
            evicted = count + self.local_end - len(self.memory)
            rolled = self.local_end - evicted - self.sink
            moved = self.memory[self.sink + evicted : self.sink + evicted + rolled]
            self.memory[self.sink : self.sink + rolled] = moved
            local_end = self.local_end + current_end - self.global_end - evicted
        else:
            local_end = self.local_end + current_end - self.global_end
        self.memory[local_end - count : local_end] = list(range(start, current_end))
        self.global_end, self.local_end = current_end, local_end
        return self.memory[max(0, local_end - self.max_attention) : local_end]


class Slots:
    """An engine's cache: what was written to each slot last, the last being nobody's."""

    def __init__(self, cache: int) -> None:
        self.cache = cache
        self.content: dict[int, int] = {}

    def forward(self, place: Place, count: int) -> list[int]:
        """Write a chunk's frames, and read the first slots; a slot in use is written by none."""
        assert len(place.slots) >= count
        assert all(slot == self.cache for slot in place.slots[count:])
        for index, slot in enumerate(place.slots[:count]):
            frame = place.position + index
            if slot == self.cache:
                assert frame not in place.attended
                continue
            held = self.content.get(slot, frame)
            assert held >= place.position or held not in place.attended
            self.content[slot] = frame
        return [self.content[slot] for slot in range(len(place.attended))]


def settings() -> Iterator[tuple[int, Window]]:
    """Chunks with windows, sinks and limits of attention that fit: some divide, most do not."""
    sizes = (None, 4, 5, 6, 7, 12, 13)
    for f, size, sink, limit in product((1, 2, 3, 4), sizes, (0, 1, 3), (None, 2, 4, 7)):
        fits = sink == 0 if size is None else size >= sink + f
        if fits and (size is not None or limit is not None):
            yield f, Window(size, sink, limit)


def capacity(window: Window) -> int:
    return min(limit for limit in (window.size, window.max_attention) if limit is not None)


def sizes_of(kind: str, f: int) -> list[int]:
    """The frames of each chunk: all alike, 1-3-3-..., or whatever comes."""
    if kind == "even":
        return [f] * CHUNKS
    if kind == "first":
        return [1] + [f] * (CHUNKS - 1)
    dice = random.Random(f)
    return [dice.randint(1, f) for _ in range(CHUNKS)]


@pytest.mark.parametrize("kind", ["even", "first", "ragged"])
def test_a_chunk_sees_what_the_official_list_holds(kind: str) -> None:
    tried = 0
    for f, window in settings():
        official = OfficialCache(window.size, window.sink, window.max_attention)
        cache = capacity(window)
        kept, slots = KeptFrames(window, chunk=f, cache=cache), Slots(cache)
        for count in sizes_of(kind, f):
            expected = official.forward(kept.position, count)
            for _ in range(2):  # a step, and the commit
                place = kept.begin(count)
                assert list(place.attended) == expected
                assert sorted(slots.forward(place, count)) == sorted(place.attended)
                assert official.forward(kept.position, count) == expected
            kept.commit()
            assert set(kept.frames) >= set(expected) - {None}
        tried += 1
    assert tried > 200


def test_a_cache_without_a_window_holds_the_clip_and_no_more() -> None:
    kept, slots = KeptFrames(Window(), chunk=3, cache=8), Slots(8)
    for count in (3, 3, 2):
        place = kept.begin(count)
        assert slots.forward(place, count) == list(range(place.position + count))
        kept.commit()
    assert kept.position == 8 and kept.frames == tuple(range(8))
    with pytest.raises(BadRequest, match="cache of 8 frames is full at frame 8: give a window"):
        kept.begin(1)


def test_one_frame_a_chunk_never_needs_the_slot_that_nobody_sees() -> None:
    for window in (Window(5, 1), Window(5, 1, 3), Window(None, 0, 3)):
        kept = KeptFrames(window, chunk=1, cache=5)
        for _ in range(40):
            assert kept.begin(1).slots != (5,)
            kept.commit()


def test_a_chunk_that_was_cancelled_may_be_begun_again() -> None:
    kept, straight = (KeptFrames(Window(7, 1), chunk=3, cache=7) for _ in range(2))
    for _ in range(20):
        for _ in range(2):
            kept.begin(3)
        kept.rewind(0)
        assert kept.begin(3) == straight.begin(3)
        kept.commit()
        straight.commit()
        assert kept.frames == straight.frames


def test_a_shorter_chunk_is_refused_where_a_cancelled_one_took_what_it_sees() -> None:
    kept = KeptFrames(Window(7, 1), chunk=3, cache=7)
    for _ in range(2):
        kept.begin(3)
        kept.commit()
    kept.begin(1)  # is one of seven: nothing has to go
    kept.begin(3)
    with pytest.raises(BadRequest, match=r"at frame 6 would see frame 1, whose slot another chunk"):
        kept.begin(1)
    assert kept.begin(3).attended == (0, 3, 4, 5, 6, 7, 8)


@pytest.mark.parametrize("kind", ["even", "first", "ragged"])
def test_a_rewind_gives_what_a_video_that_never_went_on_has(kind: str) -> None:
    dice, accepted, refused = random.Random(0), 0, 0
    for f, window in settings():
        cache = capacity(window)
        kept, slots, sizes = KeptFrames(window, chunk=f, cache=cache), Slots(cache), list[int]()
        for count in sizes_of(kind, f):
            slots.forward(kept.begin(count), count)
            kept.commit()
            sizes.append(count)
            back = dice.randrange(4)
            if back and back <= len(sizes):
                try:
                    kept.rewind(sum(sizes[-back:]))
                except BadRequest:
                    refused += 1
                    continue
                accepted += 1
                del sizes[-back:]
                straight = OfficialCache(window.size, window.sink, window.max_attention)
                for number, size in enumerate([*sizes, f]):
                    expected = straight.forward(sum(sizes[:number]), size)
                place = kept.begin(f)
                assert list(place.attended) == expected
                assert set(slots.forward(place, f)) == set(expected)
                kept.commit()
                sizes.append(f)
    assert accepted > 200 and refused > 200


def test_a_rewind_ends_where_chunks_do_and_changes_nothing_when_refused() -> None:
    kept = KeptFrames(Window(), chunk=3, cache=21)
    for count in (1, 3, 3):
        kept.begin(count)
        kept.commit()
    for wrong in (1, 2, 5, 8, -3, True, 1.5, "3"):
        with pytest.raises(BadRequest, match=r"cannot rewind by .*: expected 0, 3, 6, 7$"):
            kept.rewind(wrong)  # type: ignore[arg-type]
    assert kept.position == 7
    kept.rewind(6)
    assert (kept.position, kept.frames) == (1, (0,))
    kept.rewind(1)
    assert (kept.position, kept.frames) == (0, ())
    with pytest.raises(BadRequest, match=r"cannot rewind by 3 frames, .*: expected 0$"):
        kept.rewind(3)


def test_only_the_last_chunk_of_a_full_window_can_be_made_again() -> None:
    kept = KeptFrames(Window(7, 1), chunk=3, cache=7)
    for _ in range(6):
        kept.begin(3)
        kept.commit()
    before = kept.frames
    with pytest.raises(BadRequest, match="would see frame 9, whose slot another chunk has taken"):
        kept.rewind(6)
    assert (kept.position, kept.frames) == (18, before)
    kept.rewind(3)
    assert kept.position == 15 and kept.begin(3).attended == (0, 12, 13, 14, 15, 16, 17)


def test_a_video_ends_where_the_table_of_positions_does() -> None:
    kept = KeptFrames(Window(6), chunk=3, cache=6)
    for count in [1] + [3] * 341:
        kept.begin(count)
        kept.commit()
    assert kept.position == MAX_FRAMES == 1024
    with pytest.raises(BadRequest, match=r"ends after 1024 latent frames, .* and 1024 are there"):
        kept.begin(1)


def test_a_commit_needs_a_chunk() -> None:
    kept = KeptFrames(Window(), chunk=3, cache=6)
    with pytest.raises(BadRequest, match="no chunk was begun"):
        kept.commit()
    kept.begin(3)
    kept.commit()
    with pytest.raises(BadRequest, match="no chunk was begun"):
        kept.commit()


@pytest.mark.parametrize("count", [0, 4, -1])
def test_a_chunk_of_no_or_too_many_frames_is_refused(count: int) -> None:
    with pytest.raises(BadRequest, match=f"a chunk has {count} frames: this engine takes 1 to 3"):
        KeptFrames(Window(), chunk=3, cache=6).begin(count)


@pytest.mark.parametrize(
    ("window", "said"),
    [
        (Window(0), "window is 0: expected a whole number of latent frames, 1 or more"),
        (Window(7.5), "window is 7.5"),  # type: ignore[arg-type]
        (Window(True), "window is True"),
        (Window(7, -1), "sink is -1: expected a whole number of latent frames, 0 or more"),
        (Window(7, 1, 0), "max_attention is 0"),
        (Window(None, 2), "a sink of 2 frames means nothing without a window"),
        (Window(5, 3), "a window of 5 frames does not hold a sink of 3 and a chunk of 3: give 6"),
        (Window(22), "22 frames would be attended to, and the engine's cache holds 21"),
        (Window(None, 0, 30), "30 frames would be attended to, .* build an engine with --cache 30"),
    ],
)
def test_a_window_that_an_engine_cannot_keep_is_refused(window: Window, said: str) -> None:
    with pytest.raises(BadRequest, match=said):
        KeptFrames(window, chunk=3, cache=21)


def test_a_wide_window_with_little_attention_fits_a_small_cache() -> None:
    kept = KeptFrames(Window(21, 3, 6), chunk=3, cache=6)
    for _ in range(20):
        kept.begin(3)
        kept.commit()
    assert kept.frames == tuple(range(54, 60))


def test_looking_for_room_changes_nothing() -> None:
    kept = KeptFrames(Window(), chunk=3, cache=6)
    kept.begin(3)
    kept.commit()
    kept.check_room([3])
    with pytest.raises(BadRequest, match="cache of 6 frames is full at frame 6"):
        kept.check_room([3, 1])
    assert (kept.position, kept.frames) == (3, (0, 1, 2))
    kept.rewind(3)
    assert (kept.position, kept.frames) == (0, ())
