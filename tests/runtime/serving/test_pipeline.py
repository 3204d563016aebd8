"""A pipeline that stays: its cache, queue, cancels and failures, on an engine of the test's own."""

import gc
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch

from tests.quick import slow_but
from tests.runtime.test_denoiser import EchoEngine, record
from tests.test_imports import WITHOUT_TORCH
from wanexport.graphs.config import PRESETS
from wanexport.runtime import Denoiser, Step, WanExportError, load, sample
from wanexport.runtime.bundle.pinned_file import PinnedFile
from wanexport.runtime.engines.device import to_device
from wanexport.runtime.engines.engine import Memory
from wanexport.runtime.errors import BadRequest
from wanexport.runtime.family import family_named
from wanexport.runtime.parts import open as parts_module
from wanexport.runtime.parts.find import ComponentFiles
from wanexport.runtime.sample import seeded_noise
from wanexport.runtime.serving import pipeline as pipeline_module
from wanexport.runtime.serving.jobs import JobQueue
from wanexport.runtime.serving.pipeline import Pipeline
from wanexport.runtime.wan_config import EXPERTS

SECONDS = 3  # within which whatever is waited for comes, or the test fails
Open = Callable[..., Pipeline]


class Engine(EchoEngine):
    """velocity = latent / 2 + mean of the text, after `before` has seen the inputs."""

    def __init__(self, before: Callable[[Mapping[str, Any]], object] = lambda inputs: None) -> None:
        self.before, self.calls = before, 0

    def __call__(
        self,
        inputs: Mapping[str, Any],
        weights: PinnedFile | None = None,
        memory: Memory | None = None,
        moment: str = "step",
    ) -> np.ndarray:
        self.calls += 1
        self.before(inputs)
        velocity: np.ndarray = inputs["latent"] / 2 + inputs["text"].mean(dtype=np.float32)
        return velocity


class Encoder:
    """Embeddings that follow from the text; the texts it was given, and whether it was closed."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.closed = False

    def __call__(self, prompts: Sequence[str]) -> list[np.ndarray]:
        self.texts += prompts
        return [embedding(prompt) for prompt in prompts]

    def close(self) -> None:
        self.closed = True


class Codec:
    """Frames that are the first channel of the latent; counts its calls, and spoils its input."""

    def __init__(self) -> None:
        self.encoded, self.decoded = 0, 0
        self.tiled = False

    def encode(self, video: np.ndarray) -> np.ndarray:
        self.encoded += 1
        frames = (video.shape[1] - 1) // 4 + 1
        return np.full((1, 16, frames, *(n // 8 for n in video.shape[2:])), 0.5, np.float32)

    def decode(self, latent: np.ndarray) -> np.ndarray:
        self.decoded += 1
        frames = np.repeat(latent[0, 0, ..., None], 3, axis=-1).astype(np.uint8)
        latent[:] = 0
        return frames


def embedding(text: str) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
    return np.random.default_rng(seed).standard_normal((5, 4096), np.float32)


def denoiser_of(preset: str, engine: Engine) -> Denoiser:
    model = PRESETS[preset]
    made = replace(record(model.config, model.experts), target={"device": "cpu"})
    return Denoiser(made, dict.fromkeys(model.experts or ("",), engine))


@pytest.fixture
def open_pipeline(monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Opens pipelines on a given engine, and closes them."""
    opened: list[Pipeline] = []

    def open_one(engine: Engine, preset: str = "tiny", **options: Any) -> Pipeline:
        monkeypatch.setattr(pipeline_module, "load", lambda bundle: denoiser_of(preset, engine))
        pipeline = Pipeline("bundle", **{"text_encoder": Encoder(), "vae": Codec(), **options})
        opened.append(pipeline)
        return pipeline

    yield open_one
    for pipeline in opened:
        pipeline.close()


def official_negative(denoiser: Denoiser) -> str:
    """The negative prompt as the encoder is given it: cleaning turns its wide commas into plain."""
    return family_named(denoiser.record.family).negative.replace("\uff0c", ",")


def alone(denoiser: Denoiser, prompt: str, seed: int, **settings: Any) -> np.ndarray:
    """The latent of a request, without a pipeline."""
    noise = seeded_noise(denoiser.inputs["latent"].shape, seed)
    texts: Any = {"text": embedding(prompt), "negative": embedding(official_negative(denoiser))}
    *_, last = sample(denoiser, noise=noise, **texts, **settings)
    latent: np.ndarray = last.latent
    return latent


def md5(array: np.ndarray) -> str:
    return hashlib.md5(array.tobytes()).hexdigest()


def wait_until(holds: Callable[[], bool], seconds: float = SECONDS) -> None:
    """Return when it holds, or when the seconds are over."""
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.001)


class Gate:
    """An engine's `before` that waits at its first call until it is opened."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self, inputs: object) -> None:
        self.reached.set()
        assert self.opened.wait(SECONDS)


def test_a_generation_is_what_sample_gives_for_the_same_prompt_and_seed(
    open_pipeline: Open,
) -> None:
    pipeline = open_pipeline(Engine())
    made = pipeline.generate("a red circle", seed=3, steps=4, shift=3.0, guidance=4.0)
    expected = alone(pipeline.denoiser, "a red circle", 3, steps=4, shift=3.0, guidance=4.0)
    np.testing.assert_array_equal(made.latent, expected)
    assert made.video is not None
    np.testing.assert_array_equal(made.video[..., 0], expected[0, 0].astype(np.uint8))
    assert (made.prompt, made.seed, made.solver) == ("a red circle", 3, "unipc")
    assert (made.guidance, made.timesteps[0]) == ((4.0,) * 4, 999.0)
    assert made.negative == family_named(pipeline.denoiser.record.family).negative
    assert made.seconds.keys() == {"text", "image", "sampling", "decode"}
    assert (made.prompt_cached, made.notes) == (False, ())


def test_the_same_prompt_again_skips_the_encoder_and_gives_the_same_bits(
    open_pipeline: Open,
) -> None:
    encoder = Encoder()
    pipeline = open_pipeline(Engine(), text_encoder=encoder)
    first = pipeline.generate("a red circle", steps=2)
    again = pipeline.generate("  a red\n circle ", steps=2)  # the same when cleaned
    assert encoder.texts == ["a red circle", official_negative(pipeline.denoiser)]
    assert (first.prompt_cached, again.prompt_cached) == (False, True)
    assert md5(again.latent) == md5(first.latent)
    pipeline.clear_prompts()
    assert md5(pipeline.generate("a red circle", steps=2).latent) == md5(first.latent)
    assert len(encoder.texts) == 4


def test_the_cache_drops_what_was_unused_for_longest(open_pipeline: Open) -> None:
    encoder = Encoder()
    pipeline = open_pipeline(Engine(), text_encoder=encoder, prompt_cache=2)
    for prompt in ("one", "two", "one", "three", "one", "two"):
        pipeline.generate(prompt, steps=1, guidance=1, decode=False)
    assert encoder.texts == ["one", "two", "three", "two"]


def test_without_a_cache_every_request_is_encoded(open_pipeline: Open) -> None:
    encoder = Encoder()
    pipeline = open_pipeline(Engine(), text_encoder=encoder, prompt_cache=0)
    assert [pipeline.generate("one", steps=1, guidance=1).prompt_cached for _ in "ab"] == [
        False
    ] * 2
    assert encoder.texts == ["one", "one"]
    for bad in (-1, 1.5):
        with pytest.raises(WanExportError, match="expected 0 or more"):
            open_pipeline(Engine(), prompt_cache=bad)


def test_a_run_without_guidance_encodes_no_negative_prompt(open_pipeline: Open) -> None:
    encoder = Encoder()
    pipeline = open_pipeline(Engine(), text_encoder=encoder)
    assert pipeline.generate("one", timesteps=[900, 500]).negative is None
    assert pipeline.generate("one", negative="", steps=1).negative == ""
    assert encoder.texts == ["one", ""]


class Opened:
    """Stands for a checkpoint: makes an encoder at each opening, and keeps them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.encoders: list[Encoder] = []
        here = Path("model")
        files = ComponentFiles("model", "diffusers", here, here, here, None)
        monkeypatch.setattr(parts_module, "find_components", lambda *_, needs: files)
        monkeypatch.setattr(parts_module, "choose_vae_engine", lambda *_: None)
        monkeypatch.setattr(parts_module, "carried_encoder", lambda *_: None)
        monkeypatch.setitem(parts_module._OPENERS, "text_encoder", self.open)

    def open(self, files: ComponentFiles, device: str) -> Encoder:
        assert device == "cpu"
        self.encoders.append(Encoder())
        return self.encoders[-1]


@pytest.mark.parametrize("tiling", [None, True, False])
def test_how_the_vae_cuts_pictures_can_be_chosen(
    tiling: bool | None, open_pipeline: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    Opened(monkeypatch)
    asked: list[Any] = []

    class Closing(Codec):
        def close(self) -> None:
            pass

    def opened(files: ComponentFiles, device: str, *, tiling: bool | None) -> Codec:
        asked.append(tiling)
        return Closing()

    monkeypatch.setitem(parts_module._OPENERS, "vae", opened)
    options = {} if tiling is None else {"vae_tiling": tiling}
    open_pipeline(Engine(), vae=None, **options).generate("one", steps=1)
    assert asked == [tiling]


def test_the_text_encoder_is_freed_before_denoising_and_opened_for_a_new_prompt(
    open_pipeline: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Opened(monkeypatch)

    def all_closed(inputs: object) -> None:
        assert all(encoder.closed for encoder in opened.encoders)

    pipeline = open_pipeline(Engine(all_closed), text_encoder=None, keep_text_encoder=False)
    for prompt, count in (("one", 1), ("one", 1), ("two", 2)):
        pipeline.generate(prompt, steps=1)
        assert len(opened.encoders) == count
    assert [len(encoder.texts) for encoder in opened.encoders] == [2, 1]


def test_a_kept_text_encoder_is_opened_once_and_closed_with_the_pipeline(
    open_pipeline: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Opened(monkeypatch)
    pipeline = open_pipeline(Engine(), text_encoder=None)
    pipeline.generate("one", steps=1)
    pipeline.generate("two", steps=1)
    (encoder,) = opened.encoders
    assert not encoder.closed
    pipeline.close()
    assert encoder.closed


def test_an_encoder_of_another_width_is_refused_and_not_kept(
    open_pipeline: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Opened(monkeypatch)
    monkeypatch.setattr(Encoder, "text_dim", 64, raising=False)
    pipeline = open_pipeline(engine := Engine(), text_encoder=None)
    with pytest.raises(WanExportError, match="gives 64 values a token"):
        pipeline.generate("one", steps=1)
    assert engine.calls == 0
    assert [encoder.closed for encoder in opened.encoders] == [True]


def test_an_encoder_that_was_given_is_never_closed(open_pipeline: Open) -> None:
    encoder = Encoder()
    pipeline = open_pipeline(Engine(), text_encoder=encoder, keep_text_encoder=False)
    pipeline.generate("one", steps=1)
    pipeline.close()
    assert not encoder.closed


def test_a_missing_part_is_told_before_any_work(
    open_pipeline: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object, needs: Sequence[str]) -> ComponentFiles:
        raise WanExportError(f"no {' and '.join(needs)}")

    monkeypatch.setattr(parts_module, "choose_vae_engine", lambda *_: None)
    monkeypatch.setattr(parts_module, "carried_encoder", lambda *_: None)
    monkeypatch.setattr(parts_module, "find_components", missing)
    encoder = Encoder()
    pipeline = open_pipeline(engine := Engine(), text_encoder=encoder, vae=None)
    with pytest.raises(WanExportError, match=r"^no vae$"):
        pipeline.generate("one", steps=1)
    assert (encoder.texts, engine.calls) == ([], 0)
    pipeline = open_pipeline(engine, text_encoder=None, vae=None)
    with pytest.raises(WanExportError, match=r"^no text_encoder and vae$"):
        pipeline.generate("one", steps=1)


def test_a_bundle_of_random_weights_says_before_any_work_where_its_parts_are(
    tiny_bundle: Path,
) -> None:
    steps: list[Step] = []
    encoder = Encoder()
    with Pipeline(tiny_bundle, text_encoder=encoder, dtype="fp32") as pipeline:
        with pytest.raises(WanExportError, match=r"random weights alone: .*the VAE"):
            pipeline.generate("one", steps=1, on_step=lambda step, _: steps.append(step))
        assert not steps
        assert not encoder.texts
        assert pipeline.generate("one", steps=1, decode=False).video is None
    with Pipeline(tiny_bundle, vae=Codec(), dtype="fp32") as pipeline:
        with pytest.raises(WanExportError, match="the text encoder"):
            pipeline.generate("one", steps=1)


def test_every_step_is_reported_with_their_number(open_pipeline: Open) -> None:
    seen: list[tuple[int, int]] = []
    open_pipeline(Engine()).generate(
        "one", steps=3, on_step=lambda step, steps: seen.append((step.index, steps))
    )
    assert seen == [(0, 3), (1, 3), (2, 3)]


def test_seeds_of_a_prompt_are_those_of_single_requests(open_pipeline: Open) -> None:
    encoder = Encoder()
    pipeline = open_pipeline(Engine(), text_encoder=encoder, prompt_cache=0)
    many = pipeline.generate_seeds("one", [5, 0], steps=2)
    assert len(encoder.texts) == 2  # prompt and negative
    assert [made.seed for made in many] == [5, 0]
    assert [made.prompt_cached for made in many] == [False, True]
    for made in many:
        single = pipeline.generate("one", seed=made.seed, steps=2)
        np.testing.assert_array_equal(made.latent, single.latent)
        np.testing.assert_array_equal(made.video, single.video)
    assert pipeline.generate_seeds("one", []) == []


def test_the_latent_is_the_callers_own(open_pipeline: Open) -> None:
    """Neither a step that was kept nor the codec, which spoils what it is given, is behind it."""
    steps: list[Step] = []
    pipeline = open_pipeline(Engine())
    made = pipeline.generate("one", steps=2, on_step=lambda step, _: steps.append(step))
    expected = alone(pipeline.denoiser, "one", 0, steps=2)
    np.testing.assert_array_equal(made.latent, expected)
    assert not np.shares_memory(made.latent, steps[-1].latent)


def boom(*_: object) -> None:
    raise RuntimeError("boom")


def poison(latent: np.ndarray) -> None:
    latent[0, 0, 0, 0, 0] = np.nan


BAD_REQUESTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "solver": ({"solver": "heun"}, BadRequest, "unknown solver"),
    "steps": ({"steps": 0}, BadRequest, "steps must be"),
    "seed": ({"seed": -1}, BadRequest, "seed is -1: expected a whole number"),
    "no number": ({"seed": "one"}, BadRequest, "seed is 'one'"),
    "truth": ({"seed": True}, BadRequest, "seed is True"),
    "negative": ({"negative": 7}, BadRequest, "negative is 7: expected text"),
    "image": ({"image": Path("cat.png")}, BadRequest, "takes no image"),
    "no image": ({"image": b"none"}, BadRequest, "takes no image"),
    "weights": ({"weights": 7}, BadRequest, "weights is 7: expected text"),
    "empty weights": ({"weights": ""}, BadRequest, "weights is empty"),
    "other weights": ({"weights": "style"}, BadRequest, "leave 'style' out"),
    "empty image": ({"image": ""}, BadRequest, "image is empty: name one, or leave it out"),
    "blank image": ({"last_image": " "}, BadRequest, "last_image is empty"),
    "sigmas": ({"steps": None, "timesteps": [1, 0.5]}, BadRequest, "as timesteps: 1000,500$"),
    "callback": ({"on_step": boom}, RuntimeError, "boom"),
    "NaN": ({"on_step": lambda s, _: poison(s.latent)}, WanExportError, "NaN or Inf"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_bad_request_is_an_error_of_its_own_alone(name: str, open_pipeline: Open) -> None:
    options, kind, message = BAD_REQUESTS[name]
    pipeline = open_pipeline(Engine())
    bad = pipeline.submit("one", **{"steps": 2, **options})
    good = pipeline.submit("two", steps=2)
    with pytest.raises(kind, match=message):
        bad.result(SECONDS)
    assert bad.done()
    np.testing.assert_array_equal(
        good.result(SECONDS).latent, alone(pipeline.denoiser, "two", 0, steps=2)
    )


def test_what_is_no_prompt_is_refused(open_pipeline: Open) -> None:
    pipeline = open_pipeline(Engine())
    with pytest.raises(WanExportError, match="prompt is None: expected text"):
        pipeline.generate(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="stepps"):
        pipeline.submit("one", stepps=2)  # type: ignore[call-arg]
    for blank in ("", " \n", "&nbsp;"):
        with pytest.raises(WanExportError, match="the prompt is empty: say what the video shows"):
            pipeline.generate(blank)
    with pytest.raises(WanExportError, match="seeds is 5: expected whole numbers"):
        pipeline.generate_seeds("one", 5)  # type: ignore[arg-type]
    with pytest.raises(WanExportError, match="model is empty: name one, or leave it out"):
        open_pipeline(Engine(), model="")


def test_nan_of_the_engine_names_the_step(open_pipeline: Open) -> None:
    engine = Engine(lambda inputs: poison(inputs["latent"]) if engine.calls == 3 else None)
    pipeline = open_pipeline(engine)
    with pytest.raises(WanExportError, match=r"^engine 64x96x9/onnx-fp32 gave NaN .* step 2:"):
        pipeline.generate("one", steps=4, guidance=1)
    assert engine.calls == 3
    assert np.isfinite(pipeline.generate("one", steps=4, guidance=1).latent).all()


FAULTS: dict[str, tuple[Callable[[np.ndarray], Any], str]] = {
    "NaN": (lambda rows: [rows * np.nan], "gave NaN or Inf for 'one'"),
    "one row": (lambda rows: [rows[0]], r"gave shape \[4096\]"),
    "no rows": (lambda rows: [rows[:0]], r"gave shape \[0, 4096\]"),
    "many rows": (lambda rows: [np.ones((513, 4096))], r"gave shape \[513, 4096\].* 1 to 512$"),
    "width": (lambda rows: [rows[:, :64]], r"gave shape \[5, 64\] .* \[n, 4096\]"),
    "no list": (lambda rows: rows, "gave a ndarray, not a list of one,"),
    "nothing": (lambda rows: None, "gave a NoneType, not a list of one,"),
}


@pytest.mark.parametrize("fault", ["raises", *FAULTS])
def test_what_a_failing_encoder_gave_is_not_kept(fault: str, open_pipeline: Open) -> None:
    class Failing(Encoder):
        def __call__(self, prompts: Sequence[str]) -> list[np.ndarray]:
            made = super().__call__(prompts)
            if len(self.texts) > 1:
                return made
            if fault == "raises":
                raise RuntimeError("boom")
            return FAULTS[fault][0](made[0])

    kind, told = (RuntimeError, "boom") if fault == "raises" else (WanExportError, FAULTS[fault][1])
    pipeline = open_pipeline(Engine(), text_encoder=Failing())
    with pytest.raises(kind, match=told):
        pipeline.generate("one", steps=1, guidance=1)
    again = pipeline.generate("one", steps=1, guidance=1)
    assert not again.prompt_cached
    np.testing.assert_array_equal(
        again.latent, alone(pipeline.denoiser, "one", 0, steps=1, guidance=1)
    )


def test_an_encoder_may_reuse_its_memory(open_pipeline: Open) -> None:
    class Reusing(Encoder):
        buffer = np.empty((5, 4096), np.float32)

        def __call__(self, prompts: Sequence[str]) -> list[np.ndarray]:
            self.buffer[:] = embedding(prompts[0])
            return [self.buffer]

    pipeline = open_pipeline(Engine(), text_encoder=Reusing())
    for prompt in ("one", "two", "one"):
        np.testing.assert_array_equal(
            pipeline.generate(prompt, steps=2).latent, alone(pipeline.denoiser, prompt, 0, steps=2)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_encoder_may_give_a_torch_tensor(dtype: torch.dtype, open_pipeline: Open) -> None:
    tensor = torch.from_numpy(embedding("one")).to(dtype)
    pipeline = open_pipeline(Engine(), text_encoder=lambda prompts: [tensor])
    latents = [pipeline.generate("one", steps=1, guidance=1).latent]
    if dtype == torch.float32:
        np.testing.assert_array_equal(
            latents[0], alone(pipeline.denoiser, "one", 0, steps=1, guidance=1)
        )
    tensor.zero_()  # the pipeline has its own copy
    latents.append(pipeline.generate("one", steps=1, guidance=1).latent)
    np.testing.assert_array_equal(latents[0], latents[1])


def test_a_request_keeps_the_numbers_that_it_was_given(open_pipeline: Open) -> None:
    gate = Gate()
    pipeline = open_pipeline(Engine(gate), "t2v-a14b")
    timesteps, guidance = [900.0, 500.0], [3.0, 4.0]
    others: list[dict[str, Any]] = [
        {"timesteps": timesteps, "guidance": guidance},
        {"timesteps": iter(timesteps)},
        {"timesteps": np.array(timesteps), "guidance": np.float32(2)},
    ]
    first = pipeline.submit("one", steps=1, guidance=1)
    changed, used_up, array = (pipeline.submit("one", **asked) for asked in others)
    timesteps[0], guidance[1] = 800.0, 1.0
    gate.opened.set()
    made = [job.result(SECONDS) for job in (first, changed, used_up, array)]
    assert [one.timesteps for one in made[1:]] == [(900.0, 500.0)] * 3
    assert [one.guidance for one in made[1:]] == [(4.0, 3.0), (1.0, 1.0), (2.0, 2.0)]


def test_seeds_are_whole_numbers_of_any_kind(open_pipeline: Open) -> None:
    pipeline = open_pipeline(Engine())
    many = pipeline.generate_seeds("one", np.arange(2), steps=1)
    assert [repr(made.seed) for made in many] == ["0", "1"]
    np.testing.assert_array_equal(many[1].latent, pipeline.generate("one", seed=1, steps=1).latent)
    again = pipeline.generate_seeds("one", iter([3, 2]), steps=1)
    assert [made.seed for made in again] == [3, 2]


def test_jobs_are_served_in_order(open_pipeline: Open) -> None:
    gate = Gate()
    encoder = Encoder()
    pipeline = open_pipeline(Engine(gate), text_encoder=encoder)
    jobs = [pipeline.submit(p, steps=1, guidance=1) for p in ("one", "two", "three", "four")]
    gate.opened.set()
    for job in jobs:
        job.result(SECONDS)
    assert encoder.texts == ["one", "two", "three", "four"]


def test_a_queued_job_that_is_cancelled_never_starts(open_pipeline: Open) -> None:
    gate = Gate()
    encoder = Encoder()
    pipeline = open_pipeline(Engine(gate), text_encoder=encoder)
    running = pipeline.submit("one", steps=1, guidance=1)
    assert gate.reached.wait(SECONDS)
    queued, last = (pipeline.submit(p, steps=1, guidance=1) for p in ("two", "three"))
    assert queued.cancel()
    assert queued.cancel()
    assert queued.done()
    gate.opened.set()
    with pytest.raises(CancelledError):
        queued.result(SECONDS)
    last.result(SECONDS)
    assert encoder.texts == ["one", "three"]
    assert running.done()
    assert not running.cancel()
    assert running.result().prompt == "one"


def test_a_running_job_that_is_cancelled_stops_after_its_step(open_pipeline: Open) -> None:
    gate = Gate()
    engine = Engine(gate)
    pipeline = open_pipeline(engine)
    running = pipeline.submit("one", steps=50, guidance=1)
    assert gate.reached.wait(SECONDS)
    with pytest.raises(TimeoutError):
        running.result(0.01)
    assert running.cancel()
    assert not running.done()
    gate.opened.set()
    with pytest.raises(CancelledError):
        running.result(SECONDS)
    assert (engine.calls, running.done(), running.cancel()) == (1, True, True)
    assert pipeline.generate("two", steps=1).prompt == "two"


def test_a_cancel_in_the_last_step_is_kept(open_pipeline: Open) -> None:
    """`cancel` has said that there will be no result."""
    pipeline = open_pipeline(Engine())
    jobs: list[Any] = []
    told: list[bool] = []
    ready = threading.Event()

    def cancel(step: Step, steps: int) -> None:
        assert ready.wait(SECONDS)
        if step.index == steps - 1:
            told.append(jobs[0].cancel())

    jobs.append(pipeline.submit("one", steps=2, on_step=cancel))
    ready.set()
    with pytest.raises(CancelledError):
        jobs[0].result(SECONDS)
    assert told == [True]


def test_an_error_after_a_cancel_does_not_break_its_promise(open_pipeline: Open) -> None:
    gate = Gate()
    pipeline = open_pipeline(Engine(gate))
    job = pipeline.submit("one", steps=2, on_step=boom)
    assert gate.reached.wait(SECONDS)
    assert job.cancel()
    gate.opened.set()
    with pytest.raises(CancelledError):
        job.result(SECONDS)


def test_closing_cancels_the_queue_and_ends_the_thread(open_pipeline: Open) -> None:
    gate = Gate()
    before = set(threading.enumerate())
    pipeline = open_pipeline(Engine(gate))
    (worker,) = set(threading.enumerate()) - before
    jobs = [pipeline.submit("one", steps=50) for _ in range(3)]
    assert gate.reached.wait(SECONDS)
    threading.Timer(0.05, gate.opened.set).start()
    pipeline.close()
    assert not worker.is_alive()
    for job in jobs:
        assert job.done()
        with pytest.raises(CancelledError):
            job.result()
    pipeline.close()
    for use in (pipeline.submit, pipeline.generate):
        with pytest.raises(WanExportError, match=r"^the pipeline is closed: open another one$"):
            use("one")


def test_a_callback_may_submit_and_close_but_not_wait(open_pipeline: Open) -> None:
    pipeline = open_pipeline(Engine())
    submitted: list[Any] = []

    def nested(step: Step, steps: int) -> None:
        submitted.append(pipeline.submit("two", steps=1))
        with pytest.raises(WanExportError, match="use submit"):
            pipeline.generate("two")

    def close(step: Step, steps: int) -> None:
        pipeline.close()
        submitted.append("closed")

    pipeline.generate("one", steps=1, on_step=nested)
    assert submitted[0].result(SECONDS).prompt == "two"
    with pytest.raises(CancelledError):
        pipeline.submit("one", steps=9, on_step=close).result(SECONDS)
    assert submitted[1:] == ["closed"]


def test_an_interrupt_cancels_the_request_that_is_waited_for(open_pipeline: Open) -> None:
    engine = Engine()
    pipeline = open_pipeline(engine)

    def interrupt(step: Step, steps: int) -> None:
        if step.index == 0:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            time.sleep(0.2)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            pipeline.generate("one", steps=10_000, guidance=1, on_step=interrupt)
    finally:
        signal.signal(signal.SIGINT, before)
    assert pipeline.submit("two", steps=1).result(SECONDS).prompt == "two"
    assert engine.calls < 10_000


def test_a_callback_that_waits_for_a_job_of_its_own_pipeline_is_refused(
    open_pipeline: Open,
) -> None:
    """It would wait for ever."""
    pipeline = open_pipeline(Engine())
    submitted: list[Any] = []

    def wait(step: Step, steps: int) -> None:
        submitted.append(pipeline.submit("two", steps=1))
        submitted[0].result()

    with pytest.raises(WanExportError, match=r"^a callback cannot wait .*: use submit$"):
        pipeline.submit("one", steps=1, on_step=wait).result(SECONDS)
    assert submitted[0].result(SECONDS).prompt == "two"


def test_a_finished_job_may_be_asked_for_its_result_in_a_callback(open_pipeline: Open) -> None:
    pipeline = open_pipeline(Engine())
    finished = pipeline.submit("one", steps=1)
    finished.result(SECONDS)
    prompts: list[str] = []
    pipeline.generate("two", steps=1, on_step=lambda *_: prompts.append(finished.result().prompt))
    assert prompts == ["one"]


@pytest.mark.parametrize("length", [1, 2])
def test_an_error_that_causes_itself_ends_its_job_alone(length: int, open_pipeline: Open) -> None:
    def fail(*_: object) -> None:
        errors = [RuntimeError(str(number)) for number in range(length)]
        for error, cause in zip(errors, errors[1:] + errors[:1]):
            error.__cause__ = cause
        raise errors[0]

    pipeline = open_pipeline(Engine())
    with pytest.raises(RuntimeError):
        pipeline.submit("one", steps=1, on_step=fail).result(SECONDS)
    assert pipeline.submit("two", steps=1).result(SECONDS).prompt == "two"


class Vicious(Exception):
    """An error that cannot be looked into."""

    @property
    def __cause__(self) -> BaseException:  # type: ignore[override]
        raise RuntimeError("no cause")


@pytest.mark.parametrize("error", [Vicious, MemoryError, SystemExit, KeyboardInterrupt])
def test_any_error_ends_its_job_alone(error: type[BaseException], open_pipeline: Open) -> None:
    def fail(*_: object) -> None:
        raise error

    pipeline = open_pipeline(Engine())
    bad, good = (pipeline.submit("one", steps=1, on_step=f) for f in (fail, None))
    with pytest.raises(error):
        bad.result(SECONDS)
    assert good.result(SECONDS).prompt == "one"


def test_a_job_whose_outcome_cannot_be_kept_ends_with_an_error(
    open_pipeline: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    gate = Gate()
    pipeline = open_pipeline(Engine(gate))
    lost, good = (pipeline.submit("one", steps=1) for _ in "ab")
    monkeypatch.setattr(lost, "_settle", fail)
    gate.opened.set()
    with pytest.raises(WanExportError, match="was lost when its pipeline failed: put it again"):
        lost.result(SECONDS)
    assert good.result(SECONDS).prompt == "one"


def test_a_thread_that_fails_lets_nobody_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    begin = threading.Event()

    def fail(queue: JobQueue) -> bool:
        assert begin.wait(SECONDS)
        raise MemoryError

    monkeypatch.setattr(JobQueue, "_run_next", fail)
    queue = JobQueue("test")
    jobs = [queue.submit(lambda check: None) for _ in range(3)]
    begin.set()
    for job in jobs:
        with pytest.raises(WanExportError, match="was lost when its pipeline failed"):
            job.result(SECONDS)
    with pytest.raises(WanExportError, match="the pipeline is closed"):
        queue.submit(lambda check: None)
    queue.close()


def test_a_queue_that_is_full_refuses_and_forgets_what_was_cancelled(open_pipeline: Open) -> None:
    gate = Gate()
    pipeline = open_pipeline(Engine(gate), max_waiting=2)
    running = pipeline.submit("one", steps=1)
    assert gate.reached.wait(SECONDS)
    waiting = [pipeline.submit("one", steps=1) for _ in range(2)]
    full = r"^2 requests wait already: try again when one is done \(a server answers 503\), or open"
    for ask in (pipeline.submit, pipeline.generate):
        with pytest.raises(WanExportError, match=full):
            ask("one", steps=1)
    assert waiting[0].cancel()
    waiting.append(pipeline.submit("two", steps=1))
    with pytest.raises(WanExportError, match=full):
        pipeline.prewarm()
    gate.opened.set()
    assert [job.result(SECONDS).prompt for job in (running, *waiting[1:])] == ["one", "one", "two"]
    for bad in (0, -1, True, 1.5, None):
        with pytest.raises(WanExportError, match=r"max_waiting is .*: expected 1 or more"):
            open_pipeline(Engine(), max_waiting=bad)


def test_a_forked_process_is_told_that_it_has_no_pipeline(open_pipeline: Open) -> None:
    pipeline = open_pipeline(Engine())
    child = os.fork()
    if child == 0:
        try:
            pipeline.submit("one", steps=1).result(1)
        except WanExportError as error:
            os._exit(7 if "which was forked" in str(error) else 1)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_errors_in_a_group_hold_no_arrays(open_pipeline: Open) -> None:
    held: list[Any] = []

    def fail(step: Step, steps: int) -> None:
        def one() -> None:
            array = np.zeros(9)
            held.append(weakref.ref(array))
            raise RuntimeError

        errors = []
        for _ in range(2):
            try:
                one()
            except RuntimeError as error:
                errors.append(error)
        raise ExceptionGroup("two", [errors[0], ExceptionGroup("one", errors[1:])])

    job = open_pipeline(Engine()).submit("one", steps=1, on_step=fail)
    with pytest.raises(ExceptionGroup):
        job.result(SECONDS)
    assert [array() for array in held] == [None, None]


@pytest.mark.parametrize(("preset", "fps"), [("tiny", 16), ("t2v-a14b", 16), ("ti2v-5b", 24)])
def test_a_generation_has_the_frame_rate_of_its_model(
    preset: str, fps: int, open_pipeline: Open
) -> None:
    assert open_pipeline(Engine(), preset).generate("one", steps=1, decode=False).fps == fps


@pytest.mark.parametrize("line", range(8))
def test_a_job_may_end_between_any_two_lines_of_close(line: int) -> None:
    queue = JobQueue("test")
    begun, end = threading.Event(), threading.Event()

    def work(check: object) -> None:
        begun.set()
        assert end.wait(SECONDS)

    job = queue.submit(work)
    assert begun.wait(SECONDS)
    lines = iter(range(1000))

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code is not JobQueue.close.__code__:
            return None
        if event == "line" and next(lines) == line:
            end.set()
            wait_until(lambda: queue._running is None, seconds=0.02)  # close may hold the lock
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        queue.close()
    finally:
        sys.settrace(before)
    assert job.done()


@pytest.mark.parametrize("ask", ["generate", "submit"])
def test_a_failed_request_keeps_no_pipeline(ask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even until the next garbage collection: an engine may fill a GPU."""
    monkeypatch.setattr(pipeline_module, "load", lambda bundle: denoiser_of("tiny", Engine()))
    pipeline = Pipeline("bundle", text_encoder=Encoder(), vae=Codec())
    dropped = weakref.ref(pipeline)
    gc.disable()
    try:
        if ask == "generate":
            with suppress(RuntimeError):
                pipeline.generate("one", steps=1, on_step=boom)
        else:  # the job, with its error, outlives the pipeline
            job = pipeline.submit("one", steps=1, on_step=boom)
            wait_until(job.done)
        del pipeline
        wait_until(lambda: dropped() is None)
    finally:
        gc.enable()
    assert dropped() is None


def test_a_submitted_job_keeps_its_pipeline_open(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()
    monkeypatch.setattr(pipeline_module, "load", lambda bundle: denoiser_of("tiny", Engine(gate)))
    before = set(threading.enumerate())
    jobs = [
        pipeline.submit("one", seed=seed, steps=1)
        for pipeline in [Pipeline("bundle", text_encoder=Encoder(), vae=Codec())]
        for seed in range(2)
    ]
    (worker,) = set(threading.enumerate()) - before
    gc.collect()
    gate.opened.set()
    assert [job.result(SECONDS).seed for job in jobs] == [0, 1]
    worker.join(SECONDS)
    assert not worker.is_alive()


def test_threads_that_ask_for_one_new_prompt_encode_it_once(open_pipeline: Open) -> None:
    encoder = Encoder()
    pipeline = open_pipeline(Engine(), text_encoder=encoder)
    with ThreadPoolExecutor(4) as threads:
        made = list(
            threads.map(lambda seed: pipeline.generate("one", seed=seed, steps=2), range(8))
        )
    assert sorted(encoder.texts) == sorted(["one", official_negative(pipeline.denoiser)])
    assert sorted(m.prompt_cached for m in made) == [False] + [True] * 7
    for one in made:
        np.testing.assert_array_equal(
            one.latent, alone(pipeline.denoiser, "one", one.seed, steps=2)
        )


def test_waiting_jobs_hold_no_arrays(open_pipeline: Open) -> None:
    gate = Gate()
    pipeline = open_pipeline(Engine(gate))
    pipeline.submit("one", steps=1)
    assert gate.reached.wait(SECONDS)
    tracemalloc.start()
    jobs = [pipeline.submit("one", seed=seed) for seed in range(50)]
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 50 * 4000 < 50 * alone(denoiser_of("tiny", Engine()), "one", 0, steps=1).nbytes
    for job in jobs:
        job.cancel()
    gate.opened.set()


def test_nothing_of_a_request_lives_on_in_its_job_or_in_the_thread(open_pipeline: Open) -> None:
    latents: list[Any] = []

    def watch(step: Step, steps: int) -> None:
        latents.append(weakref.ref(step.latent))
        if steps == 2:
            boom()

    pipeline = open_pipeline(Engine())
    failed = pipeline.submit("one", steps=2, on_step=watch)
    with pytest.raises(RuntimeError):
        failed.result(SECONDS)
    assert latents[0]() is None
    made = weakref.ref(pipeline.generate("one", steps=3, on_step=watch))
    wait_until(lambda: made() is None)  # the thread may not be back in its wait yet
    assert made() is None
    assert [latent() for latent in latents] == [None] * 4


def test_a_dropped_pipeline_ends_its_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_module, "load", lambda bundle: denoiser_of("tiny", Engine()))
    before = set(threading.enumerate())
    pipeline = Pipeline("bundle", text_encoder=Encoder(), vae=Codec())
    pipeline.generate("one", steps=1)
    (worker,) = set(threading.enumerate()) - before
    del pipeline
    gc.collect()
    worker.join(SECONDS)
    assert not worker.is_alive()


def test_a_warning_about_the_timesteps_comes_once(open_pipeline: Open) -> None:
    pipeline = open_pipeline(Engine())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipeline.generate_seeds("one", [0, 1], timesteps=[400, 200])
    assert ["begin at 400" in str(warning.message) for warning in caught] == [True]


def test_prewarm_runs_every_part_once_and_changes_no_result(open_pipeline: Open) -> None:
    cold = open_pipeline(Engine()).generate("one", steps=2)
    engine, encoder, codec = Engine(), Encoder(), Codec()
    pipeline = open_pipeline(engine, text_encoder=encoder, vae=codec)
    assert pipeline.prewarm(decode=False) > 0
    assert (engine.calls, codec.decoded) == (1, 0)
    pipeline.prewarm()
    pipeline.prewarm()
    assert (engine.calls, len(encoder.texts), codec.decoded, codec.encoded) == (1, 1, 1, 0)
    warm = pipeline.generate("one", steps=2)
    assert md5(warm.latent) == md5(cold.latent)
    assert encoder.texts == [official_negative(pipeline.denoiser), "one"]


def test_prewarm_opens_no_part_when_another_is_missing(
    open_pipeline: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Opened(monkeypatch)

    def without_vae(*_: object, needs: Sequence[str]) -> ComponentFiles:
        raise WanExportError(f"no {' and '.join(needs)}")

    monkeypatch.setattr(parts_module, "find_components", without_vae)
    pipeline = open_pipeline(engine := Engine(), text_encoder=None, vae=None)
    with pytest.raises(WanExportError, match=r"^no text_encoder and vae$"):
        pipeline.prewarm()
    assert (opened.encoders, engine.calls) == ([], 0)


def test_prewarm_ends_with_the_expert_that_a_request_begins_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    served: list[str] = []
    model = denoiser_of("t2v-a14b", Engine())
    model.engines = {e: Engine(partial(lambda e, _: served.append(e), e)) for e in EXPERTS}
    monkeypatch.setattr(pipeline_module, "load", lambda bundle: model)
    with Pipeline("bundle", text_encoder=Encoder(), vae=Codec()) as pipeline:
        pipeline.prewarm()
        assert served == ["low_noise", "high_noise"]


class ImageEncoder:
    """Counts its images."""

    images = 0

    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        self.images += len(images)
        return np.ones((1, 257 * len(images), 1280), np.float32)


@pytest.mark.parametrize("preset, images", [("i2v-14b", 1), ("flf2v-14b", 2)])
def test_prewarm_of_an_image_model_encodes_grey_images(
    preset: str, images: int, open_pipeline: Open
) -> None:
    codec, image_encoder = Codec(), ImageEncoder()
    pipeline = open_pipeline(Engine(), preset, vae=codec, image_encoder=image_encoder)
    pipeline.prewarm()
    assert (codec.encoded, codec.decoded, image_encoder.images) == (1, 1, images)


@pytest.mark.parametrize("tiled", [False, True])
def test_a_vae_that_was_short_of_memory_is_told(tiled: bool, open_pipeline: Open) -> None:
    codec = Codec()
    codec.tiled = tiled
    made = open_pipeline(Engine(), vae=codec).generate("one", steps=1)
    assert ["tiles" in note for note in made.notes] == [True] * tiled


def test_an_image_is_encoded_once_for_all_seeds_and_its_note_is_told(
    open_pipeline: Open, tmp_path: Path
) -> None:
    from PIL import Image

    path = tmp_path / "cat.png"
    Image.fromarray(np.zeros((100, 120, 3), np.uint8)).save(path)
    codec, image_encoder = Codec(), ImageEncoder()
    given: list[Mapping[str, Any]] = []
    engine = Engine(given.append)
    pipeline = open_pipeline(engine, "i2v-14b", vae=codec, image_encoder=image_encoder)
    many = pipeline.generate_seeds("one", [0, 1], image=path, steps=1)
    assert (codec.encoded, image_encoder.images) == (1, 1)
    assert all("cat.png" in note for made in many for note in made.notes)
    assert many[0].notes
    assert given[0]["condition"].shape == (1, 20, 3, 8, 12)
    assert (given[0]["image"] == 1).all()
    with pytest.raises(WanExportError, match="image-to-video"):
        pipeline.generate("one", steps=1)


def test_an_engine_of_torch_is_given_tensors_without_autograd(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As one on a GPU: the latent stays a tensor from step to step, and for the codec."""
    given: list[Any] = []

    class OfTorch(EchoEngine):
        def array(self, value: Any) -> Any:
            return to_device(value, torch.device("cpu"))

        def __call__(
            self,
            inputs: Mapping[str, Any],
            weights: PinnedFile | None = None,
            memory: Memory | None = None,
            moment: str = "step",
        ) -> Any:
            given.append(inputs["latent"])
            return inputs["latent"] / 2

    def decode(latent: Any) -> np.ndarray:
        given.append(latent)
        return np.zeros((9, 64, 96, 3), np.uint8)

    model = Denoiser(denoiser_of("tiny", Engine()).record, {"": OfTorch()})
    monkeypatch.setattr(pipeline_module, "load", lambda bundle: model)
    codec = Codec()
    monkeypatch.setattr(codec, "decode", decode)
    with Pipeline("bundle", text_encoder=Encoder(), vae=codec) as pipeline:
        made = pipeline.generate("one", steps=2, guidance=1)
    assert [latent.is_inference() for latent in given] == [True] * 3
    assert isinstance(made.latent, np.ndarray)
    assert not np.shares_memory(made.latent, given[-1].numpy())


def test_two_pipelines_and_a_direct_caller_share_one_engine(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = load(tiny_bundle, dtype="fp32")
    expected = {seed: alone(shared, "one", seed, steps=3) for seed in range(4)}
    monkeypatch.setattr(pipeline_module, "load", lambda bundle: shared)
    parts: Any = {"text_encoder": Encoder(), "vae": Codec()}
    with Pipeline("bundle", **parts) as one, Pipeline("bundle", **parts) as other:
        jobs = {s: (one.submit("one", seed=s, steps=3), other.submit("one", seed=s, steps=3))
                for s in expected}  # fmt: skip
        for seed in expected:
            np.testing.assert_array_equal(alone(shared, "one", seed, steps=3), expected[seed])
        for seed, pair in jobs.items():
            for job in pair:
                np.testing.assert_array_equal(job.result(SECONDS).latent, expected[seed])


@pytest.mark.slow
def test_100_requests_from_4_threads_are_all_answered_in_constant_memory(
    tiny_bundle: Path,
) -> None:
    command = [sys.executable, "-m", "tests.tables.pipeline_requests", str(tiny_bundle)]
    child = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert child.returncode == 0, child.stderr
    told = json.loads(child.stdout)
    assert told["answers"] == {"equal": 70, "cancelled": 15, "refused": 15}
    assert told["rss_after_100"] <= 1.05 * told["rss_after_10"]


@pytest.mark.parametrize("minutes", slow_but(["0.02", "0.08"], "0.02"))
def test_eight_threads_are_served_while_parts_fail(minutes: str) -> None:
    command = [sys.executable, "-m", "tests.tables.serving_soak", "--minutes", minutes]
    child = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert child.returncode == 0, child.stdout + child.stderr
    assert "threads left after close: 0" in child.stdout


EXIT = """
import threading
from wanexport.runtime.serving.pipeline import Pipeline
from tests.runtime.serving.test_pipeline import Codec, Encoder
pipeline = Pipeline({bundle!r}, text_encoder=Encoder(), vae=Codec(), dtype="fp32")
begun = threading.Event()
jobs = [pipeline.submit("one", steps=10_000, on_step=lambda *_: begun.set()) for _ in range(3)]
assert begun.wait(30)
print("leaving")
"""


def test_the_interpreter_ends_with_a_pipeline_open_and_jobs_in_it(tiny_bundle: Path) -> None:
    child = subprocess.run(
        [sys.executable, "-c", EXIT.format(bundle=str(tiny_bundle))],
        capture_output=True,
        text=True,
        timeout=2 * SECONDS,
        cwd=Path(__file__).parents[3],
    )
    assert (child.returncode, child.stdout, child.stderr) == (0, "leaving\n", "")


def test_a_request_may_run_while_another_thread_imports_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(
        "import time, contextlib; time.sleep(0.3); inference_mode = contextlib.nullcontext"
    )
    code = (
        "import sys, threading, time\n"
        "from wanexport.runtime.serving.generator import computing\n"
        "threading.Thread(target=__import__, args=('torch',)).start()\n"
        "while 'torch' not in sys.modules: time.sleep(0.001)\n"
        "with computing(None): assert sys.modules['torch'].inference_mode\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
    )
    assert child.returncode == 0, child.stderr


def test_a_pipeline_with_parts_of_its_own_needs_no_torch(tiny_bundle: Path) -> None:
    code = WITHOUT_TORCH.format(blocked={"torch", "transformers", "diffusers", "av", "PIL"}) + (
        "import numpy as np\n"
        "from wanexport.runtime.serving.pipeline import Pipeline\n"
        "encode = lambda texts: [np.ones((3, 4096), np.float32) for _ in texts]\n"
        f"with Pipeline({str(tiny_bundle)!r}, text_encoder=encode, dtype='fp32') as pipeline:\n"
        "    made = pipeline.generate('one', steps=1, decode=False)\n"
        "assert np.isfinite(made.latent).all()\n"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
