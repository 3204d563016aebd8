"""Between two sizes of video only multiples of the token grid differ, and tables of it in rows."""

from collections.abc import Callable

import numpy as np
import pytest

from wanexport.exporter.backends.grid import Grid, check_same
from wanexport.runtime.errors import WanExportError
from wanexport.runtime.geometry import Geometry

FULL, SMALL = Geometry(256, 256, 17), Geometry(128, 256, 17)  # grids (5, 16, 16) and (5, 8, 16)
GRID = Grid(FULL, SMALL)
TABLE = np.arange(64, dtype=np.float32).reshape(2, 16, 2)


def test_the_sizes_are_what_the_tests_say() -> None:
    assert (FULL.grid, SMALL.grid) == ((5, 16, 16), (5, 8, 16))


def test_multiples_of_lengths_may_differ_and_are_counted() -> None:
    products = [16, 5 * 16, 16 * 16, 5 * 16 * 16]
    for multiple in (1, 2, 3, 1536, -1):
        full = [7, -1, 0, *(multiple * n for n in products)]
        small = [7, -1, 0, *(multiple * n // 2 for n in products)]
        assert GRID.count_differing("block", full, small) == 4
        assert GRID.count_differing("block", full, full) == 0


@pytest.mark.parametrize(
    ("full", "small"),
    [
        (17, 8),  # of another ratio
        (12, 6),  # of the ratio, and of no whole length
        (2, 1),
        (8, 16),  # the other way round
        (1, 0),
        (16, 5),
        (2**62, 2**61 + 1),  # not in floating point
        (5, 8),  # of an axis that is the same at both sizes
    ],
)
def test_other_integers_are_refused(full: int, small: int) -> None:
    with pytest.raises(WanExportError, match=rf"block has the integer {full} .*{small}, which is"):
        GRID.count_differing("block", [3, full], [3, small])


def test_more_integers_are_refused() -> None:
    with pytest.raises(WanExportError, match="block has 2 at the engine's size and 1 at the proof"):
        GRID.count_differing("block", [16, 16], [8])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_longer_table_of_the_grid_has_equal_rows(axis: int) -> None:
    full = np.moveaxis(TABLE, 1, axis)
    GRID.check_table("embed", full, full.take(range(8), axis))
    GRID.check_table("embed", full, full.copy())


def changed(table: np.ndarray) -> np.ndarray:
    other = table.copy()
    other.flat[-1] = np.nextafter(other.flat[-1], np.float32(0))
    return other


@pytest.mark.parametrize(
    ("full", "small"),
    [
        (TABLE, changed(TABLE[:, :8])),  # in a row that both have, by one bit
        (TABLE, changed(TABLE)),
        (TABLE, TABLE[:, :7]),  # no length of the grid
        (TABLE[:, :10], TABLE[:, :5]),  # of the ratio, and of no whole length
        (TABLE[:, :8], TABLE),  # the other way round
        (TABLE, TABLE[:1, :8]),  # in two axes
        (TABLE, TABLE[0]),
        (TABLE[0, :, 0], TABLE[0, :8, 0]),  # of one axis it is no table
        (TABLE, TABLE.astype(np.float64)),
        (np.float32(1), np.float32(2)),
        (np.float32(np.nan), np.float32(np.nan)),
        (TABLE[:0], TABLE),
    ],
)
def test_other_tables_are_refused(full: np.ndarray, small: np.ndarray) -> None:
    with pytest.raises(WanExportError, match="what the proof runs is not this engine") as caught:
        GRID.check_table("embed", np.asarray(full), np.asarray(small))
    assert "\n" not in str(caught.value)


def test_the_number_that_differs_is_named() -> None:
    with pytest.raises(WanExportError, match=r"constant of 63\.0 .* one of 0\.5 at"):
        other = TABLE.copy()
        other[-1, -1, -1] = 0.5
        GRID.check_table("embed", TABLE, other)


@pytest.mark.parametrize("make", [lambda: "a" * 500, lambda: ("Add", 1)])
def test_what_differs_is_one_short_line(make: Callable[[], object]) -> None:
    check_same("head", make(), make())
    with pytest.raises(WanExportError, match=r"^head has .* report this$") as caught:
        check_same("head", make(), "other")
    assert len(str(caught.value)) < 400
