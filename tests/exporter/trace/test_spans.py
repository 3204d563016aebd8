"""Spans of time: which lies in which, and how much of them is covered."""

import pytest

from tests.exporter.trace.traces import op
from wanexport.exporter.trace.event import OPERATOR, Event
from wanexport.exporter.trace.spans import (
    ancestors,
    busy_share,
    gaps,
    parents,
    self_times,
    union,
)


def test_an_event_lies_in_the_innermost_one_of_its_thread() -> None:
    elsewhere = Event("other", OPERATOR, 3, 4, ("1", "2"))
    events = [
        op("a", 0, 10),
        op("b", 1, 5),
        op("c", 2, 3),
        elsewhere,
        op("d", 5, 6),
        op("e", 10, 11),
    ]
    of = parents(events)
    assert of == [None, 0, 1, None, 0, None]
    assert [events[i].name for i in ancestors(2, of)] == ["c", "b", "a"]
    assert self_times(events, of) == [5, 3, 1, 1, 1, 1]


def test_of_two_that_begin_together_the_longer_one_is_around_the_other() -> None:
    of = parents([op("a", 0, 10), op("b", 0, 4), op("c", 0, 4), op("d", 4, 4), op("e", 10, 10)])
    assert of == [None, 0, 1, 0, None]


def test_a_child_that_outlasts_its_parent_by_a_rounding_takes_no_more_than_it() -> None:
    events = [op("a", 0, 10), op("b", 4, 10.5)]
    assert self_times(events, parents(events)) == [4, 6.5]


def test_time_that_is_covered_twice_counts_once() -> None:
    assert union([(5, 6), (0, 2), (1, 3), (3, 4)]) == [(0, 4), (5, 6)]
    assert gaps([(5, 6), (0, 2), (1, 3), (9, 12)]) == [(3, 5), (6, 9)]
    assert busy_share([(5, 6), (0, 2), (1, 3)]) == pytest.approx(4 / 6)
    assert busy_share([(0, 8), (1, 2)]) == 1
    assert busy_share([]) is None
    assert busy_share([(3, 3)]) == 1
