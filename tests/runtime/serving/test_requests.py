"""What a request may hold and name: pictures in any form, weights; and a pipeline that closes."""

import asyncio
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import pytest
import torch
from PIL import Image

from tests.runtime.serving.test_pipeline import (
    SECONDS,
    Codec,
    Encoder,
    Engine,
    Gate,
    ImageEncoder,
    Open,
    Opened,
    alone,
    denoiser_of,
    open_pipeline,
)
from wanexport.runtime import BadRequest, BundleError, Denoiser, EngineFailure, Pipeline
from wanexport.runtime.serving import pipeline as pipeline_module
from wanexport.runtime.serving.request import RequestKeywords, make_request

__all__ = ["open_pipeline"]  # a fixture

PIXELS = np.random.default_rng(1).integers(0, 256, (128, 192, 3), np.uint8)


def test_every_way_to_ask_has_the_keywords_of_generate() -> None:
    keywords = RequestKeywords.__annotations__.keys()
    generate = inspect.signature(Pipeline.generate).parameters
    assert generate.keys() - {"self", "prompt", "seed"} == keywords
    assert keywords - inspect.signature(make_request).parameters.keys() == {
        "negative", "weights", "decode", "output", "on_step",
    }  # fmt: skip
    for ask in (Pipeline.submit, Pipeline.generate_seeds):
        assert inspect.signature(ask).parameters["asked"].annotation == Unpack[RequestKeywords]


class Seeing(Codec):
    """Keeps the videos that it encodes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[np.ndarray] = []

    def encode(self, video: np.ndarray) -> np.ndarray:
        self.seen.append(video.copy())
        return super().encode(video)


FORMS: dict[str, Callable[[Path], Any]] = {
    "str": str,
    "bytes": Path.read_bytes,
    "PIL": Image.open,
    "array": lambda path: PIXELS.copy(),
    "tensor": lambda path: torch.from_numpy(PIXELS.copy()).div(255),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_request_takes_its_pictures_in_any_form(
    form: str, open_pipeline: Open, tmp_path: Path
) -> None:
    path = tmp_path / "cat.png"
    Image.fromarray(PIXELS).save(path)
    codec = Seeing()
    pipeline = open_pipeline(Engine(), "flf2v-14b", vae=codec, image_encoder=ImageEncoder())
    for given in (path, FORMS[form](path)):
        pipeline.generate("one", image=given, last_image=given, steps=1, guidance=1)
    from_file, other = codec.seen
    assert other.tobytes() == from_file.tobytes()
    # The picture has twice the engine's sides; a bicubic of this factor without antialiasing.
    first = torch.from_numpy(PIXELS).permute(2, 0, 1)[None].div(127.5).sub(1)
    scaled = torch.nn.functional.interpolate(first, size=(64, 96), mode="bicubic")[0]
    np.testing.assert_allclose(from_file[:, 0], scaled, atol=1e-5)
    np.testing.assert_array_equal(from_file[:, -1], from_file[:, 0])
    assert not from_file[:, 1:-1].any()


def test_pixels_that_were_passed_are_the_callers_to_change_and_close(
    open_pipeline: Open, tmp_path: Path
) -> None:
    path = tmp_path / "cat.png"
    Image.fromarray(PIXELS).save(path)
    gate, codec = Gate(), Seeing()
    pipeline = open_pipeline(Engine(gate), "i2v-14b", vae=codec, image_encoder=ImageEncoder())
    settings: Any = {"steps": 1, "guidance": 1}
    pipeline.submit("one", image=path, **settings)
    assert gate.reached.wait(SECONDS)
    array, tensor = PIXELS.copy(), torch.from_numpy(PIXELS.copy())
    jobs = [pipeline.submit("one", image=image, **settings) for image in (array, tensor)]
    with Image.open(path) as opened:
        jobs.append(pipeline.submit("one", image=opened, **settings))
    array[:] = 0
    tensor.zero_()
    gate.opened.set()
    for job in jobs:
        job.result(SECONDS)
    assert len({video.tobytes() for video in codec.seen}) == 1 and len(codec.seen) == 4


def test_a_picture_in_memory_that_cannot_be_read_is_refused_at_once(open_pipeline: Open) -> None:
    engine = Engine()
    pipeline = open_pipeline(engine, "i2v-14b", image_encoder=ImageEncoder())
    pictures: list[Any] = [np.zeros((3, 64, 96), np.uint8), [[1]], torch.full((9, 9, 3), 2.0)]
    for bad in pictures:
        for ask in (pipeline.submit, pipeline.generate):
            with pytest.raises(BadRequest, match=r"^image "):
                ask("one", image=bad)
    job = pipeline.submit("one", image=b"none")
    with pytest.raises(BadRequest, match=r"cannot read image, 4 bytes, .*it is none"):
        job.result(SECONDS)
    assert engine.calls == 0


class Styled(Denoiser):
    """Notes which weights were asked for; "broken" and "none" cannot be had."""

    weights = "base"

    def __init__(self, model: Denoiser, weights: str) -> None:
        super().__init__(model.record, model.engines)
        self.weights, self.asked = weights, list[str]()
        self.closed = 0

    def use(self, weights: str | Path | None = None, **_: object) -> None:
        name = str(weights)
        self.asked.append(name)
        if name == "broken":
            raise BundleError("broken is damaged")
        if name == "none":
            raise BadRequest("none is no set")
        self.weights = name

    def close(self) -> None:
        self.closed += 1


class Served:
    """A pipeline on a styled denoiser, and the weights that each forward had."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, weights: str = "base") -> None:
        self.had: list[str] = []
        self.engine = Engine(lambda _: self.had.append(self.denoiser.weights))
        self.denoiser = Styled(denoiser_of("tiny", self.engine), weights)
        monkeypatch.setattr(pipeline_module, "load", lambda bundle, **options: self.denoiser)
        self.pipeline = Pipeline("bundle", text_encoder=Encoder(), vae=Codec())


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Served:
    return Served(monkeypatch)


def test_a_pipeline_that_never_names_weights_never_changes_them(served: Served) -> None:
    with served.pipeline as pipeline:
        pipeline.prewarm()
        pipeline.generate("one", steps=1)
        pipeline.generate_seeds("one", [1, 2], steps=1)
        pipeline.submit("one", steps=1).result(SECONDS)
        pipeline.generate("one", steps=1, weights=None)
    assert served.denoiser.asked == []


@pytest.mark.parametrize("own", ["base", "/models/tuned"])
def test_a_request_has_the_weights_that_it_names_and_others_their_own(
    own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = Served(monkeypatch, own)
    names = (None, "style", "style", None, None, "other", "style", None)
    with served.pipeline as pipeline:
        jobs = [pipeline.submit("one", steps=1, guidance=1, weights=name) for name in names]
        for job in jobs:
            job.result(SECONDS)
    assert served.had == [name or own for name in names]
    assert served.denoiser.asked == ["style", "style", own, "other", "style", own]


def test_all_seeds_of_a_request_have_its_weights(served: Served) -> None:
    with served.pipeline as pipeline:
        pipeline.generate_seeds("one", [0, 1], steps=1, guidance=1, weights="style")
        pipeline.generate("one", steps=1, guidance=1)
    assert served.had == ["style", "style", "base"]


@pytest.mark.parametrize(("name", "kind"), [("broken", BundleError), ("none", BadRequest)])
def test_weights_that_cannot_be_had_fail_their_request_alone(
    name: str, kind: type[Exception], served: Served
) -> None:
    with served.pipeline as pipeline:
        with pytest.raises(kind, match=name):
            pipeline.generate("one", steps=1, weights=name)
        assert served.had == []  # it was told before any work
        pipeline.generate("one", steps=1, guidance=1)
    assert (served.had, served.denoiser.asked) == (["base"], [name, "base"])


def test_a_request_that_fails_leaves_no_weights_to_the_next(served: Served) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError

    with served.pipeline as pipeline:
        with pytest.raises(RuntimeError):
            pipeline.generate("one", steps=1, guidance=1, weights="style", on_step=fail)
        pipeline.generate("one", steps=1, guidance=1)
    assert served.had == ["style", "base"]


def test_a_plan_follows_the_weights_that_are_in_use(served: Served) -> None:
    """A distilled set may have other sampling defaults."""
    seen: list[str] = []
    sampling = served.denoiser.record.sampling

    class Told(Styled):
        @property
        def sampling(self) -> Any:
            seen.append(self.weights)
            return sampling

    served.denoiser.__class__ = Told
    with served.pipeline as pipeline:
        pipeline.generate("one", weights="style", steps=1)
    assert set(seen) == {"style"}


def test_closing_frees_the_engine_and_the_parts_that_were_found(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Opened(monkeypatch)
    mine = Codec()
    with Pipeline("bundle", vae=mine) as pipeline:
        pipeline.generate("one", steps=1)
        assert served.denoiser.closed == 0
    assert served.denoiser.closed == 1
    assert [encoder.closed for encoder in found.encoders] == [True]
    served.pipeline.close()


def test_an_engine_is_closed_though_a_part_fails_to(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(served.pipeline._parts, "close", fail)
    with pytest.raises(RuntimeError, match="boom"):
        served.pipeline.close()
    assert served.denoiser.closed == 1


def test_the_engine_is_closed_after_the_step_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, order = Gate(), list[str]()
    served = Served(monkeypatch)

    def step(inputs: object) -> None:
        gate(inputs)
        order.append("step")

    served.engine.before = step
    monkeypatch.setattr(served.denoiser, "close", lambda: order.append("close"))
    job = served.pipeline.submit("one", steps=9, guidance=1)
    assert gate.reached.wait(SECONDS)
    asyncio.run(close_beside(served.pipeline, gate))
    assert order == ["step", "close"] and job.done()


async def close_beside(pipeline: Pipeline, gate: Gate) -> None:
    closing = asyncio.to_thread(pipeline.close)
    asyncio.get_running_loop().call_later(0.05, gate.opened.set)
    await closing


def test_a_closed_pipeline_refuses_every_request(served: Served) -> None:
    served.pipeline.close()
    asks: list[Callable[[Pipeline], object]] = [
        lambda pipeline: pipeline.generate("one"),
        lambda pipeline: pipeline.generate_seeds("one", [0]),
        lambda pipeline: pipeline.submit("one"),
        lambda pipeline: pipeline.prewarm(),
    ]
    for ask in asks:
        with pytest.raises(EngineFailure, match="closed"):
            ask(served.pipeline)


def test_requests_are_awaited(open_pipeline: Open) -> None:
    given: list[Mapping[str, Any]] = []
    pipeline = open_pipeline(Engine(given.append))

    async def main() -> list[np.ndarray]:
        jobs = [pipeline.submit("one", seed=seed, steps=2) for seed in range(3)]
        return [made.latent for made in await asyncio.gather(*jobs)]

    for seed, latent in enumerate(asyncio.run(main())):
        np.testing.assert_array_equal(latent, alone(pipeline.denoiser, "one", seed, steps=2))
