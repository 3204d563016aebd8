"""A pipeline's stream: chunks as they are made, in order, and nothing of one that was left."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from tests.runtime.causal_engine import (
    STYLE,
    CausalEngine,
    causal_denoiser,
    geometry_of,
    joined,
    latent_of,
    text_of,
)
from tests.runtime.serving.test_pipeline import Engine, wait_until
from tests.runtime.serving.test_pipeline import denoiser_of as plain_denoiser
from wanexport.runtime.denoiser import Denoiser
from wanexport.runtime.errors import BadRequest, EngineFailure
from wanexport.runtime.sample_stream import ChunkStep, sample_stream
from wanexport.runtime.serving import pipeline as pipeline_module
from wanexport.runtime.serving.pipeline import Pipeline, StreamedChunk

GEOMETRY = geometry_of(9)


class Encoder:
    def __call__(self, prompts: Any) -> list[np.ndarray]:
        return [text_of(len(prompt)) for prompt in prompts]


class Whole:
    """A VAE that decodes a clip: one frame, then four for each latent frame, of its mean."""

    def __init__(self) -> None:
        self.decoded: list[int] = []

    def encode(self, video: np.ndarray) -> np.ndarray:
        raise AssertionError

    def decode(self, latent: np.ndarray) -> np.ndarray:
        self.decoded.append(latent.shape[2])
        return frames_of(latent)


class Session:
    """Frames of each latent at once, but for the last latent frame, which waits."""

    def __init__(self) -> None:
        self.latents: list[np.ndarray] = []
        self.given = 0

    def decode(self, latent: np.ndarray) -> np.ndarray:
        self.latents.append(np.array(latent))
        return self._known(joined(self.latents)[:, :, :-1])

    def finish(self) -> np.ndarray:
        return self._known(joined(self.latents))

    def _known(self, latent: np.ndarray) -> np.ndarray:
        frames = frames_of(latent)
        new, self.given = frames[self.given :], len(frames)
        return new


class Streaming(Whole):
    def session(self) -> Session:
        return Session()


def frames_of(latent: np.ndarray) -> np.ndarray:
    count = max(0, 4 * latent.shape[2] - 3)
    means = latent.mean(axis=(0, 1, 3, 4))
    values = [means[0], *np.repeat(means[1:], 4)][:count]
    return np.stack([np.full((32, 48, 3), int(128 + 100 * v) % 256, np.uint8) for v in values])


Open = Callable[..., tuple[Pipeline, CausalEngine]]


@pytest.fixture
def open_pipeline(monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Opens pipelines on the small causal model, and closes them."""
    opened: list[Pipeline] = []

    def open_one(vae: Any = None, **geometry: Any) -> tuple[Pipeline, CausalEngine]:
        denoiser, engine = causal_denoiser(geometry_of(9, **geometry))
        monkeypatch.setattr(pipeline_module, "load", lambda bundle: denoiser)
        opened.append(Pipeline("bundle", text_encoder=Encoder(), vae=vae or Streaming()))
        return opened[-1], engine

    yield open_one
    for pipeline in opened:
        pipeline.close()


def alone(prompt: str, seed: int, **policy: Any) -> list[np.ndarray]:
    denoiser, _ = causal_denoiser(GEOMETRY)
    stream = denoiser.stream(text_of(len(prompt)), **policy)
    return [chunk.latent for chunk in sample_stream(stream, seed=seed)]


@pytest.mark.parametrize("vae", [Streaming, Whole])
def test_chunks_are_those_of_the_loop_and_frames_those_of_the_vae(
    vae: type[Whole], open_pipeline: Open
) -> None:
    codec = vae()
    pipeline, _ = open_pipeline(codec)
    made = list(pipeline.stream("a red circle", seed=5))
    expected = alone("a red circle", 5)
    assert [c.index for c in made] == [0, 1, 2, 3] and [c.position for c in made] == [0, 3, 6, 9]
    assert all(np.array_equal(c.latent, e) for c, e in zip(made, expected))
    assert made[-1].latent.shape[2] == 0
    frames = np.concatenate([c.frames for c in made if len(c.frames)])
    assert np.array_equal(frames, frames_of(joined(expected)))
    counts = [len(c.frames) for c in made]
    assert counts == ([5, 12, 12, 4] if vae is Streaming else [0, 0, 0, 33])
    assert codec.decoded == ([] if vae is Streaming else [9])


def test_embeddings_may_stand_for_the_prompt(open_pipeline: Open) -> None:
    pipeline, _ = open_pipeline()
    made = [c.latent for c in pipeline.stream(text_of(1), decode=False)]
    assert all(map(np.array_equal, made, alone("a", 0)))
    with pytest.raises(BadRequest, match="13 rows, the model takes at most 12"):
        next(pipeline.stream(np.ones((13, 20)), decode=False))


def test_a_stream_without_decoding_gives_latents_alone(open_pipeline: Open) -> None:
    pipeline, _ = open_pipeline()
    made = list(pipeline.stream("a", decode=False, length=21, initial=latent_of(GEOMETRY, 3)))
    assert [len(c.frames) for c in made] == [0, 0, 0] and [c.is_given for c in made] == [
        True,
        False,
        False,
    ]
    assert sum(c.latent.shape[2] for c in made) == 9


def test_the_whole_clip_is_a_request_like_any_other(open_pipeline: Open) -> None:
    pipeline, _ = open_pipeline(Whole())
    told: list[tuple[int, int, int]] = []
    made = pipeline.generate(
        "a red circle",
        seed=5,
        on_step=lambda step, steps: told.append((step.index, steps, step.latent.shape[2])),
    )
    assert np.array_equal(made.latent, joined(alone("a red circle", 5)))
    assert made.video is not None and np.array_equal(made.video, frames_of(made.latent))
    assert told == [(i, 12, 3 + 3 * (i // 4)) for i in range(12)]
    assert (made.solver, made.negative, made.guidance) == ("renoise", None, (1.0,) * 4)
    for wrong in ({"solver": "euler"}, {"guidance": 3.0}):
        with pytest.raises(BadRequest, match="samples with solver renoise and guidance 1"):
            pipeline.generate("a red circle", **wrong)
    assert pipeline.prewarm() > 0


def test_a_stream_that_is_left_stops_after_its_step_and_the_next_one_is_whole(
    open_pipeline: Open,
) -> None:
    pipeline, engine = open_pipeline()
    stream = pipeline.stream("a red circle", seed=5, window=9)
    next(stream)
    stream.close()
    pipeline.generate("another", decode=False)  # which waits for the one that was left
    before = engine.calls.count("step")
    assert before < 24
    made = list(pipeline.stream("a red circle", seed=5))
    assert all(np.array_equal(c.latent, e) for c, e in zip(made, alone("a red circle", 5)))


def test_what_a_callback_raises_ends_the_stream_between_steps(open_pipeline: Open) -> None:
    pipeline, engine = open_pipeline()

    def stop(step: ChunkStep) -> None:
        if (step.chunk, step.index) == (1, 1):
            raise RuntimeError("enough")

    made: list[StreamedChunk] = []
    with pytest.raises(RuntimeError, match="enough"):
        for chunk in pipeline.stream("a", on_step=stop):
            made.append(chunk)
    assert len(made) == 1
    assert [c for c in engine.calls if c != "prompt"] == ["step"] * 4 + ["commit"] + ["step"] * 2


def test_a_chunk_waits_for_who_takes_it(open_pipeline: Open) -> None:
    pipeline, engine = open_pipeline(cache=9)
    stream = pipeline.stream("a", length=81, window=9)
    next(stream)
    wait_until(lambda: engine.calls.count("commit") >= 4)
    time.sleep(0.3)
    assert engine.calls.count("commit") == 4  # one is taken, two wait, and one waits for room
    stream.close()


def test_streams_of_two_threads_come_whole(open_pipeline: Open) -> None:
    pipeline, _ = open_pipeline()
    made: dict[str, list[np.ndarray]] = {}

    def take(prompt: str) -> None:
        made[prompt] = [chunk.latent for chunk in pipeline.stream(prompt, seed=1, decode=False)]

    threads = [threading.Thread(target=take, args=(prompt,)) for prompt in ("one", "three")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for prompt, latents in made.items():
        assert all(map(np.array_equal, latents, alone(prompt, 1)))


def test_another_weights_set_serves_one_stream(open_pipeline: Open) -> None:
    pipeline, _ = open_pipeline()
    own = [c.latent for c in pipeline.stream("a", decode=False)]
    other = [c.latent for c in pipeline.stream("a", decode=False, weights=STYLE)]
    again = [c.latent for c in pipeline.stream("a", decode=False)]
    assert all(map(np.array_equal, own, again))
    assert not np.array_equal(own[0], other[0])


def test_nan_of_a_chunk_is_an_error_of_its_own(
    open_pipeline: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, _ = open_pipeline()
    run = Denoiser.run

    def broken(self: Denoiser, *arguments: Any) -> Any:
        found = run(self, *arguments)
        return None if found is None else found * np.nan

    monkeypatch.setattr(Denoiser, "run", broken)
    with pytest.raises((EngineFailure, BadRequest), match="NaN or Inf"):
        list(pipeline.stream("a"))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": 7}, "prompt is 7: expected text, or its embeddings"),
        ({"length": 10}, "a length of 10 frames is not legal: expected 4k.1, 9 or 13"),
        ({"length": 0}, "length is 0"),
        ({"length": 2.5}, "length is 2.5"),
        ({"length": 81}, "cache of 9 frames is full at frame 9: give a window"),
        ({"window": 3, "sink": 1}, "a window of 3 frames does not hold"),
        ({"timesteps": [5.0, 6.0]}, "timesteps are"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_a_request_that_does_not_fit_is_refused_before_any_step(
    asked: dict[str, Any], said: str, open_pipeline: Open
) -> None:
    pipeline, engine = open_pipeline()
    with pytest.raises(BadRequest, match=said):
        list(pipeline.stream(**{"prompt": "a", **asked}))
    assert not engine.calls


def test_a_model_that_is_not_causal_has_no_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_module, "load", lambda bundle: plain_denoiser("tiny", Engine()))
    with Pipeline("bundle", text_encoder=Encoder(), vae=Whole()) as pipeline:
        with pytest.raises(BadRequest, match="makes a video whole: use generate"):
            pipeline.stream("a")
