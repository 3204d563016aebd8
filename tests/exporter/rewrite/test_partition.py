"""Which parts make up an axis, counted by writing to a list."""

from itertools import chain, product

import pytest

from wanexport.exporter.rewrite.partition import Arrangement, arrange, part_of, part_of_indices


@pytest.mark.parametrize("size", [2, 6])
def test_an_arrangement_gives_what_writing_gives(size: int) -> None:
    """All pairs of slices of an axis, tried against Python's own slice assignment."""
    bounds = [None, -2, 0, 1, 2, 3, size, 2**63 - 1]
    slices = [slice(a, b, c) for a, b, c in product(bounds, bounds, (1, 2, 3))]
    for one, other in product(slices, slices[::7]):
        values, place = [-1] * size, 0
        for cut in (one, other):
            cut = slice(cut.start, min(cut.stop or size, size) if cut.stop != 0 else 0, cut.step)
            count = len(values[cut])
            values[cut] = range(place, place + count)
            place += count
        parts = [part_of(size, c.start, c.stop, c.step) for c in (one, other)]
        found = arrange(size, parts)
        if isinstance(found, Arrangement):
            counts = [len(part.indices) for part in parts]
            starts = [0, counts[0]]
            pieces = [list(range(starts[i], starts[i] + counts[i])) for i in found.order]
            made = [v for row in zip(*pieces) for v in row] if found.is_stack else [*chain(*pieces)]
            assert made == values
        else:
            is_whole = place == size and -1 not in values
            assert not is_whole or "neither" in found


@pytest.mark.parametrize(
    ("indices", "shown"),
    [([0, 2, 4], "0:5:2"), ([3], "3:4"), ([1, 2], "1:3"), ([2, 1], None), ([0, 1, 3], None),
     ([], None), ([1, 1], None)],
)  # fmt: skip
def test_indices_are_a_slice_or_none(indices: list[int], shown: str | None) -> None:
    part = part_of_indices(indices)
    assert (None if part is None else str(part)) == shown
