"""Steps are given when they are done, while a GPU has the next one to go on with."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from wanexport.runtime.errors import EngineFailure
from wanexport.runtime.sample import Step
from wanexport.runtime.serving import finished as finished_module
from wanexport.runtime.serving.finished import finished_steps


def steps(events: list[str], *, bad: int = -1, count: int = 4) -> Iterator[Step]:
    for index in range(count):
        events.append(f"launched {index}")
        yield Step(index, 1.0, np.full(3, np.nan if index == bad else index))


class OnItsWay:
    """In the place of a copy that a GPU has still to make: it is there when it is read."""

    def __init__(self, value: bool, events: list[str], index: int) -> None:
        self.value, self.events, self.index = value, events, index

    def is_there(self) -> bool:
        return False

    def array(self) -> Any:
        self.events.append(f"waited for {self.index}")
        return np.array([self.value])


def seen(given: Iterator[Step], events: list[str]) -> list[str]:
    for step in given:
        events.append(f"given {step.index}")
    return events


def test_on_a_cpu_a_step_is_given_before_the_next_begins() -> None:
    events: list[str] = []
    seen(finished_steps(steps(events), "e"), events)
    assert events == [f"{what} {i}" for i in range(4) for what in ("launched", "given")]


def test_a_gpu_has_the_next_step_when_the_host_waits_for_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[str] = []

    def on_its_way(arrays: list[np.ndarray]) -> OnItsWay:
        (latent,) = arrays
        return OnItsWay(bool(np.isfinite(latent).all()), events, int(latent[0]))

    monkeypatch.setattr(finished_module, "finite", on_its_way)
    seen(finished_steps(steps(events, count=3), "e"), events)
    assert events == [
        "launched 0", "launched 1", "waited for 0", "given 0",
        "launched 2", "waited for 1", "given 1", "waited for 2", "given 2",
    ]  # fmt: skip


def test_a_step_with_nan_is_an_error_in_its_turn() -> None:
    events: list[str] = []
    with pytest.raises(EngineFailure, match="engine e gave NaN or Inf in step 2: check"):
        seen(finished_steps(steps(events, bad=2), "e"), events)
    assert "given 1" in events and "launched 3" not in events
