"""Damaged headers and JSON files of a checkpoint give one-line errors in little time."""

import pytest

from tests.graphs.checkpoint_fuzz import failures
from tests.quick import slow_but


@pytest.mark.parametrize("count", slow_but([100, 400], 100))
def test_whatever_is_damaged_one_line_says_so(count: int) -> None:
    told: list[str] = []
    assert failures(count, 0, told.append) == []
    assert int(told[0].split()[3]) > count // 2  # refused: the damage was seen
