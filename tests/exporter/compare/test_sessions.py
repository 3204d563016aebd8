"""Calls of a session are compared in a session: what a model keeps between them counts too.

The model of most tests keeps a sum: its velocity is that of all latents so far and of the prompt.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.exporter.families import memory
from tests.oracles.wan_reference import small_config
from wanexport.exporter.build import build
from wanexport.exporter.compare.compare import compare
from wanexport.exporter.compare.peers import Peers
from wanexport.exporter.compare.recorded import Loop
from wanexport.exporter.compare.rows import Comparison
from wanexport.exporter.compare.sessions import Recorder, Replay
from wanexport.exporter.compare.steppers import OnnxStepper
from wanexport.graphs.config import PRESETS, Preset
from wanexport.runtime.engines.onnx import OnnxEngine
from wanexport.runtime.family import FAMILIES, SamplingDefaults

STEPS = 3
SAMPLING = SamplingDefaults(STEPS, 5.0, (2.0, 2.0), None, 16)
Velocity = Callable[..., np.ndarray]


class Summing:
    """A denoiser whose sessions keep a sum of latents; `keep` scales what is kept.

    With `shared`, all its sessions keep one sum, as a faulty engine's would.
    """

    sampling, record = SAMPLING, SimpleNamespace(dtype="fp32")

    def __init__(self, *, keep: float = 1.0, shared: bool = False) -> None:
        self.keep, self.shared = keep, [np.zeros(1)] if shared else None
        self.inputs: dict[str, Any] = {}
        self.opened = 0

    def __call__(self, **inputs: Any) -> np.ndarray:
        return self.session()(**inputs)

    def session(self, **constant: Any) -> Velocity:
        total = self.shared or [np.zeros(1)]
        self.opened += 1

        def call(**given: Any) -> np.ndarray:
            inputs = {**constant, **given}
            total[0] = self.keep * total[0] + inputs["latent"]
            velocity: np.ndarray = (total[0] + inputs["text"].sum()).astype(np.float32)
            return velocity

        return call


def loop() -> Loop:
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((1, 2, 1, 2, 2), np.float32)
    return Loop({"noise": noise, "text": np.ones((1, 2)), "negative": np.ones((1, 3))}, STEPS)


def rows(engine: Summing) -> list[dict[str, Any]]:
    peers = Peers({("graph", "fp32"): Summing()}, None)  # type: ignore[dict-item]
    recorder = Recorder(engine)  # type: ignore[arg-type]
    return Comparison(recorder, peers, "graph", lambda *_: None).rows(loop()).rows


def test_an_engine_that_keeps_the_same_passes() -> None:
    engine = Summing()
    assert [row["error"] for row in rows(engine)] == [0, 0, 0]
    assert engine.opened == 4  # for prompt and negative, in the reference's steps and on its own


@pytest.mark.parametrize("engine", [Summing(keep=0.0), Summing(keep=0.99)])
def test_an_engine_that_loses_its_state_fails_from_the_second_step_on(engine: Summing) -> None:
    assert [row["passed"] for row in rows(engine)] == [True, False, False]


def test_an_engine_whose_sessions_meet_fails() -> None:
    assert not any(row["passed"] for row in rows(Summing(shared=True)))


def test_an_engine_that_is_lost_on_its_own_fails() -> None:
    class Lost(Summing):
        def session(self, **constant: Any) -> Velocity:
            call = super().session(**constant)
            is_own = self.opened > 2  # after those with the reference's latents
            return lambda **given: np.nan * call(**given) if is_own else call(**given)

    compared = rows(Lost())
    assert [row["error"] for row in compared] == [0, 0, 0]
    assert not any(row["passed"] for row in compared)


def test_calls_are_repeated_with_all_that_they_were_given() -> None:
    recorder = Recorder(Summing(), keep=True)  # type: ignore[arg-type]
    text, x = np.ones(2), np.full(1, 3.0)
    first, second = recorder.session(text=text), recorder.session(text=2 * text)
    expected = [
        first(latent=x),
        second(latent=x),
        first(latent=2 * x),
        recorder(latent=x, text=text),
    ]
    assert [float(velocity[0]) for velocity in expected] == [5, 7, 11, 5]
    assert [call.session for call in recorder.calls] == [0, 1, 0, 2]
    assert recorder.calls[2].inputs.keys() == {"latent", "text"}
    assert len(recorder.seconds) == 4
    replay = Replay(Summing())
    assert [replay(call) for call in recorder.calls] == expected


@pytest.fixture
def with_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The bundle of a model that reads its text once a prompt, and whose blocks remember."""
    root = str(Path(__file__).parents[3])  # where the build's processes find the family's graph
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setitem(FAMILIES, "memory", memory.FAMILY)
    config = replace(small_config("t2v-1.3b"), family="memory")
    monkeypatch.setitem(PRESETS, "memory", Preset(config))
    build("memory", random_weights=0, resolution="32x48", frames=5, output=tmp_path / "b")
    return tmp_path / "b"


@pytest.mark.slow
def test_what_a_model_keeps_between_steps_is_compared(
    with_state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = compare(with_state, steps=3, bisect=True)
    assert clean["passed"] and clean["bisect"]["first"] is None
    assert [row["call"] for row in clean["bisect"]["calls"]][:2] == ["read_text", "embed"]
    whole = OnnxEngine.__call__

    def forgetful(self: OnnxEngine, inputs: Any, weights: Any = None, memory: Any = None) -> Any:
        return whole(self, inputs, weights, self.memory())

    monkeypatch.setattr(OnnxEngine, "__call__", forgetful)
    result = compare(with_state, steps=3)
    assert [row["passed"] for row in result["steps"]] == [True, False, False]
    run = OnnxStepper.run_call

    def keeping_less(self: OnnxStepper, call: Any, index: int, given: Any) -> Any:
        kept = {name: 0.9 * v if name == "memory.1" else v for name, v in given.items()}
        return run(self, call, index, kept)

    monkeypatch.setattr(OnnxStepper, "run_call", keeping_less)
    found = compare(with_state, steps=3, bisect=True)["bisect"]
    assert found["step"] > 0  # at first there is nothing to remember
    assert found["first"] == "block 1"
