"""Damaged headers and JSON files of a checkpoint give one-line errors in little time."""

from tests.graphs.checkpoint_fuzz import failures


def test_whatever_is_damaged_one_line_says_so() -> None:
    told: list[str] = []
    assert failures(400, 0, told.append) == []
    assert int(told[0].split()[3]) > 200  # refused: the damage was seen
