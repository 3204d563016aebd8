"""All parameters are slow but those that are named."""

from typing import Any

import pytest

from tests.quick import slow_but


def quick(parameters: list[Any]) -> list[Any]:
    """The values of those that are not slow."""
    return [one.values for one in parameters if one.marks == ()]


def test_a_quick_one_is_named_by_itself_its_first_value_its_name_or_its_key() -> None:
    assert quick(slow_but(["a", "b", "c"], "b")) == [("b",)]
    assert quick(slow_but([("a", 1), ("a", 2), ("b", 1)], ("a", 2), "b")) == [("a", 2), ("b", 1)]
    assert quick(slow_but([quick, slow_but], "quick")) == [(quick,)]
    keyed = slow_but({"one": 1, "two": 2}, "two")
    assert quick(keyed) == [(2,)] and [one.id for one in keyed] == ["one", "two"]


def test_a_number_is_no_truth() -> None:
    assert quick(slow_but([1, True], True)) == [(True,)]


def test_a_quick_one_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\['d'\] is none of the parameters"):
        slow_but(["a", "b"], "a", "d")
