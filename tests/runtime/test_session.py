"""A session checks and moves its constant inputs once, and carries state from expert to expert."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.runtime.test_denoiser import EchoEngine, inputs_of, record
from wanexport.graphs.config import PRESETS
from wanexport.runtime import denoiser as module
from wanexport.runtime.arrays import Array, count_not_finite
from wanexport.runtime.denoiser import Denoiser, open_session
from wanexport.runtime.engines.engine import Memory
from wanexport.runtime.errors import BadRequest
from wanexport.runtime.program import TensorSpec
from wanexport.runtime.wan_config import EXPERTS


class Watched(EchoEngine):
    """An engine that keeps what it was asked to take, call by call."""

    def __init__(self) -> None:
        self.moved: list[tuple[int, ...]] = []
        self.calls: list[dict[str, np.ndarray]] = []

    def array(self, value: Array) -> np.ndarray:
        self.moved.append(tuple(value.shape))
        return super().array(value)

    def __call__(
        self,
        inputs: Mapping[str, np.ndarray],
        weights: Any = None,
        memory: Memory | None = None,
        moment: str = "step",
    ) -> np.ndarray:
        self.calls.append(dict(inputs))
        return inputs["latent"]


@pytest.fixture
def watched() -> tuple[Denoiser, Watched]:
    """A denoiser of image-to-video, which has five inputs."""
    engine = Watched()
    return Denoiser(record(PRESETS["i2v-14b"].config), {"": engine}), engine


def test_constant_inputs_are_checked_and_moved_once(
    watched: tuple[Denoiser, Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser, engine = watched
    searched: list[tuple[int, ...]] = []

    def counted(array: Array) -> int:
        searched.append(tuple(array.shape))
        return count_not_finite(array)

    monkeypatch.setattr(module, "count_not_finite", counted)
    given = inputs_of(denoiser)
    constant = {name: given.pop(name) for name in ("text", "condition", "image")}
    session = denoiser.session(**{**constant, "text": constant["text"][0, :7]})
    shapes = {name: spec.shape for name, spec in denoiser.inputs.items()}
    assert set(engine.moved) == set(searched) == {shapes[name] for name in constant}
    first = len(engine.moved)
    for _ in range(3):
        session(**given)
    assert set(engine.moved[first:]) == {shapes["latent"], shapes["timestep"]}
    assert len(engine.moved) == len(searched) == first + 6
    texts = [call["text"] for call in engine.calls]
    assert all(text is texts[0] for text in texts) and texts[0].shape == shapes["text"]
    assert texts[0][0, :7].all() and not texts[0][0, 7:].any()  # padded when it was opened


@pytest.mark.parametrize(
    ("constant", "said"),
    [
        ({"camera": np.ones(3)}, "camera not expected"),
        ({"text": np.ones((3, 5), np.float32)}, "text has shape"),
        ({"text": np.ones((600, 4096), np.float32)}, "600 rows, the model takes at most 512"),
        ({"image": np.full((1, 257, 1280), np.nan, np.float32)}, "image has .* NaN or Inf"),
        ({"timestep": 2000.0}, "expected from 0 to 1000"),
    ],
)
def test_a_constant_input_is_refused_when_the_session_is_opened(
    watched: tuple[Denoiser, Watched], constant: dict[str, Any], said: str
) -> None:
    denoiser, engine = watched
    with pytest.raises(BadRequest, match=said):
        denoiser.session(**constant)
    assert not engine.calls


def test_what_is_missing_is_told_at_the_call(watched: tuple[Denoiser, Watched]) -> None:
    denoiser, _ = watched
    given = inputs_of(denoiser)
    session = denoiser.session(text=given.pop("text"), condition=None)
    with pytest.raises(BadRequest, match=r"takes latent, .*: condition, image missing"):
        session(latent=given["latent"], timestep=1)
    with pytest.raises(BadRequest, match="latent missing"):
        session(**{**given, "latent": None})


def test_an_input_of_a_call_stands_in_for_the_constant_one(
    watched: tuple[Denoiser, Watched],
) -> None:
    denoiser, engine = watched
    given = inputs_of(denoiser)
    session = denoiser.session(text=given.pop("text"))
    session(**given, text=np.full((512, 4096), 2, np.float32))
    session(**given)
    assert [call["text"].max() for call in engine.calls] == [2, 1]


def test_a_constant_timestep_serves_calls_that_give_none(
    watched: tuple[Denoiser, Watched],
) -> None:
    denoiser, engine = watched
    given = inputs_of(denoiser)
    session = denoiser.session(timestep=given.pop("timestep"))
    session(**given)
    session(**given, timestep=7.0)
    assert [call["timestep"].tolist() for call in engine.calls] == [[500.0], [7.0]]


def test_the_velocity_is_of_the_latents_kind(watched: tuple[Denoiser, Watched]) -> None:
    denoiser, _ = watched
    given = inputs_of(denoiser)
    session = denoiser.session(text=torch.tensor(given.pop("text")))
    assert isinstance(session(**given), np.ndarray)
    velocity = session(**{**given, "latent": torch.tensor(given["latent"]).bfloat16()})
    assert isinstance(velocity, torch.Tensor) and velocity.dtype == torch.float32


def test_a_callable_without_sessions_is_given_everything_at_each_call() -> None:
    seen: list[dict[str, Any]] = []
    session = open_session(lambda **given: seen.append(given), text=1, image=None)
    session(latent=2)
    session(latent=3)
    assert seen == [{"text": 1, "latent": 2}, {"text": 1, "latent": 3}]


class Counting(EchoEngine):
    """An engine that adds to the latent what it keeps, and keeps 1 or 10 more."""

    def __init__(self, step: float, in_place: bool) -> None:
        self.step, self.in_place = step, in_place

    def memory(self) -> Memory:
        return Memory({"count": np.zeros(1, np.float32)})

    def __call__(
        self,
        inputs: Mapping[str, np.ndarray],
        weights: Any = None,
        memory: Memory | None = None,
        moment: str = "step",
    ) -> np.ndarray:
        assert memory is not None
        before = memory.state["count"].copy()
        if self.in_place:
            memory.state["count"] += self.step
        else:
            memory.state = {"count": before + self.step}
        return inputs["latent"] * 0 + before


@pytest.mark.parametrize("in_place", [True, False])
def test_the_state_goes_on_from_expert_to_expert(in_place: bool) -> None:
    made = record(PRESETS["t2v-a14b"].config, EXPERTS)
    program = replace(made.program, state={"count": TensorSpec((1,))})
    engines = {name: Counting(step, in_place) for name, step in zip(EXPERTS, (1, 10))}
    denoiser = Denoiser(replace(made, program=program), engines)
    given = inputs_of(denoiser)
    with pytest.raises(BadRequest, match="keeps a state from step to step"):
        denoiser(**given)
    sessions = [denoiser.session(text=given["text"]) for _ in range(2)]
    del given["text"]
    for times, counts in (((950, 900, 100, 50), (0, 1, 2, 12)), ((100, 950, 100), (0, 10, 11))):
        session = sessions.pop()
        got = [session(**{**given, "timestep": float(t)}).max() for t in times]
        assert got == list(counts)
