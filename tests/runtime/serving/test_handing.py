"""Two threads, one that makes and one that uses up: their order, and an error of either."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from wanexport.runtime.serving.handing import Handing

SECONDS = 10


def test_all_that_is_given_is_used_in_order_before_the_block_ends() -> None:
    used: list[Any] = []
    with Handing(used.extend, "test") as handing:
        for thing in range(20):
            handing.give(thing)
    assert used == list(range(20))


def test_few_things_wait() -> None:
    go_on, used = threading.Event(), []

    def use(things: Iterator[int]) -> None:
        for thing in things:
            assert go_on.wait(SECONDS)
            used.append(thing)

    given: list[int] = []

    def give() -> None:
        with Handing(use, "test") as handing:
            for thing in range(5):
                handing.give(thing)
                given.append(thing)

    giver = threading.Thread(target=give)
    giver.start()
    giver.join(0.2)
    assert given == [0, 1] and used == []
    go_on.set()
    giver.join(SECONDS)
    assert used == list(range(5))


@pytest.mark.parametrize("count", [1, 20])
def test_an_error_of_the_user_of_things_is_the_blocks(count: int) -> None:
    def use(things: Iterator[int]) -> None:
        next(things)
        raise OSError("full")

    with pytest.raises(OSError, match="full"), Handing(use, "test") as handing:
        for thing in range(count):
            handing.give(thing)


def test_an_error_of_the_block_ends_the_user_of_things_first() -> None:
    ended: list[str] = []

    def use(things: Iterator[int]) -> None:
        try:
            list(things)
            ended.append("all")
        except BaseException:
            ended.append("given up")
            raise

    with pytest.raises(ZeroDivisionError), Handing(use, "test") as handing:
        handing.give(1)
        raise ZeroDivisionError
    assert ended == ["given up"]


def test_an_interrupt_of_the_last_wait_gives_up_too(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted, used_up = threading.Event(), threading.Event()
    outcome: list[str] = []

    def use(things: Iterator[int]) -> None:
        list(things)
        used_up.set()
        assert interrupted.wait(SECONDS)
        try:
            handing.check()
            outcome.append("kept")
        except BaseException:
            outcome.append("given up")
            raise

    handing = Handing(use, "test")
    join = handing._thread.join

    def end() -> None:
        interrupted.set()
        join()

    def interrupt() -> None:
        assert used_up.wait(SECONDS)
        monkeypatch.setattr(handing._thread, "join", end)
        raise KeyboardInterrupt

    monkeypatch.setattr(handing._thread, "join", interrupt)
    with pytest.raises(KeyboardInterrupt), handing:
        handing.give(1)
    assert outcome == ["given up"]
