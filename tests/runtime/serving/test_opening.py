"""Parts open beside one another and beside the engine, each in a thread of its own."""

import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.runtime.serving.test_pipeline import Codec, Encoder, Engine, denoiser_of
from wanexport.runtime import Denoiser, WanExportError
from wanexport.runtime.engines.choose import Choice
from wanexport.runtime.engines.engine import EngineOptions
from wanexport.runtime.errors import BundleError, WanExportWarning
from wanexport.runtime.parts import open as parts_module
from wanexport.runtime.parts.find import ComponentFiles
from wanexport.runtime.parts.open import Parts
from wanexport.runtime.serving import opening as opening_module
from wanexport.runtime.serving import pipeline as pipeline_module
from wanexport.runtime.serving.pipeline import Pipeline

SECONDS = 10  # after which what waits for another is broken
PARTS = ("text_encoder", "vae")


class Closing(Codec):
    closed = False

    def close(self) -> None:
        self.closed = True


class Bundle:
    """Stands for a bundle whose engine and parts open in what the test gives."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.denoiser = denoiser_of("tiny", Engine())
        self.order: list[str] = []
        self.parts: dict[str, Any] = {"text_encoder": Encoder(), "vae": Closing()}
        self.before: Callable[[str], object] = self.order.append
        here = Path("model")
        files = ComponentFiles("model", "diffusers", here, here, here, None)
        monkeypatch.setattr(parts_module, "find_components", lambda *_, needs: files)
        monkeypatch.setattr(parts_module, "choose_vae_engine", lambda *_: None)
        monkeypatch.setattr(parts_module, "carried_encoder", lambda *_: None)
        choice = Choice(self.denoiser.record, "cpu")
        monkeypatch.setattr(opening_module, "chosen", lambda *_, **__: choice)
        monkeypatch.setattr(pipeline_module, "load", self.load)
        for part in PARTS:
            monkeypatch.setitem(parts_module._OPENERS, part, self.opener(part))

    def load(self, bundle: str) -> Denoiser:
        self.before("engine")
        return self.denoiser

    def opener(self, part: str) -> Callable[..., Any]:
        def opened(files: ComponentFiles, device: str, **options: Any) -> Any:
            self.before(part)
            return self.parts[part]

        return opened


@pytest.fixture
def bundle(monkeypatch: pytest.MonkeyPatch) -> Bundle:
    return Bundle(monkeypatch)


def test_engine_encoder_and_vae_open_at_the_same_time(bundle: Bundle) -> None:
    barrier = threading.Barrier(3, timeout=SECONDS)
    bundle.before = lambda part: barrier.wait()
    with Pipeline("bundle", open_parts=PARTS) as pipeline:
        made = pipeline.generate("one", steps=1)
    assert made.video is not None and not barrier.broken


@pytest.mark.parametrize("prewarmed", [False, True])
def test_parts_open_at_the_same_time_at_first_need(bundle: Bundle, prewarmed: bool) -> None:
    barrier = threading.Barrier(2, timeout=SECONDS)
    bundle.before = lambda part: part == "engine" or barrier.wait()
    with Pipeline("bundle") as pipeline:
        assert barrier.n_waiting == 0
        if prewarmed:
            pipeline.prewarm()
        pipeline.generate("one", steps=1)
    assert not barrier.broken


def test_a_part_that_opens_is_waited_for_and_no_other(bundle: Bundle) -> None:
    """The prompt is encoded while the VAE still opens."""
    encoded = threading.Event()
    encode = bundle.parts["text_encoder"].__call__

    class Telling(Encoder):
        def __call__(self, prompts: Any) -> list[np.ndarray]:
            encoded.set()
            made: list[np.ndarray] = encode(prompts)
            return made

    bundle.parts["text_encoder"] = Telling()
    bundle.before = lambda part: part != "vae" or encoded.wait(SECONDS) or pytest.fail("waited")
    with Pipeline("bundle", open_parts=PARTS) as pipeline:
        assert pipeline.generate("one", steps=1).video is not None


@pytest.mark.parametrize("failing", [("text_encoder",), ("vae",), ("text_encoder", "vae")])
def test_the_error_of_any_part_is_told_in_their_order(
    bundle: Bundle, failing: tuple[str, ...]
) -> None:
    def fail(part: str) -> None:
        if part in failing:
            raise BundleError(f"the {part} is damaged")

    bundle.before = fail
    for _ in range(5):
        with Pipeline("bundle", open_parts=PARTS) as pipeline:
            with pytest.raises(WanExportError, match=f"^the {failing[0]} is damaged$"):
                pipeline.generate("one", steps=1)


def test_an_engine_that_does_not_open_closes_what_did(bundle: Bundle) -> None:
    def fail(part: str) -> None:
        if part == "engine":
            raise BundleError("the engine is damaged")

    bundle.before = fail
    with pytest.raises(WanExportError, match=r"^the engine is damaged$"):
        Pipeline("bundle", open_parts=PARTS)
    assert all(part.closed for part in bundle.parts.values())


def test_a_missing_part_is_told_before_any_is_opened(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object, needs: Any) -> ComponentFiles:
        raise BundleError(f"no {' and '.join(needs)}")

    monkeypatch.setattr(parts_module, "find_components", missing)
    with pytest.raises(WanExportError, match=r"^no text_encoder and vae$"):
        Pipeline("bundle", open_parts=PARTS)
    assert bundle.order == []


def test_parts_of_an_engine_that_a_build_replaced_are_opened_anew(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = denoiser_of("t2v-1.3b", Engine()).record
    monkeypatch.setattr(opening_module, "chosen", lambda *_, **__: Choice(other, "cpu"))
    with Pipeline("bundle", open_parts=PARTS) as pipeline:
        assert all(part.closed for part in bundle.parts.values())
        pipeline.generate("one", steps=1)
    assert bundle.order.count("vae") == 2


def test_an_encoder_that_comes_first_is_gone_before_the_engine_opens(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def place(self: Parts, *, precedes: bool, first: bool, **_: Any) -> None:
        self.precedes, self.placement = precedes, {"text_encoder": "first"}
        assert precedes and first

    monkeypatch.setattr(Parts, "place", place)
    encoder = bundle.parts["text_encoder"]

    def before(part: str) -> None:
        bundle.order.append(part)
        assert part != "engine" or (encoder.closed and encoder.texts == ["one", "no"])

    bundle.before = before
    with Pipeline("bundle", open_parts=PARTS, prompts=[" one", "no", ""]) as pipeline:
        made = pipeline.generate("one", negative="no", steps=1)
        assert pipeline.placement == {"text_encoder": "first"}
    assert made.prompt_cached and bundle.order.count("text_encoder") == 1


def test_an_encoder_whose_memory_the_engine_needs_opens_after_it(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def place(self: Parts, **_: Any) -> None:
        self.placement, self.later = {"text_encoder": "before"}, frozenset({"text_encoder"})

    monkeypatch.setattr(Parts, "place", place)
    with Pipeline("bundle", open_parts=PARTS) as pipeline:
        assert set(pipeline._parts._opening) == set(PARTS)
        pipeline.generate("one", steps=1)
    order = bundle.order
    assert order.count("text_encoder") == 1 and order.index("engine") < order.index("text_encoder")


def test_encoders_are_placed_beside_the_engine_as_it_will_be_held(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With blocks streamed as `load` would choose; what it says of them is said by it."""
    found, placed = EngineOptions(offload="blocks", resident_blocks=8), list[EngineOptions]()

    def fitted(*_: object) -> EngineOptions:
        warnings.warn("blocks are streamed", WanExportWarning, stacklevel=2)
        return found

    monkeypatch.setattr(opening_module, "fitted", fitted)
    monkeypatch.setattr(Parts, "place", lambda _, options, **__: placed.append(options))
    with warnings.catch_warnings(action="error"), Pipeline("bundle", open_parts=PARTS):
        assert placed == [found]
    with Pipeline("bundle"):  # the engine is open, and its memory taken, before the parts
        assert placed == [found, EngineOptions()]


def test_what_has_no_place_beside_the_engine_is_freed_after_its_use(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def place(self: Parts, **_: Any) -> None:
        self.placement = {"text_encoder": "before"}

    monkeypatch.setattr(Parts, "place", place)
    with Pipeline("bundle", open_parts=PARTS) as pipeline:
        pipeline.generate("one", steps=1)
        assert bundle.parts["text_encoder"].closed and not bundle.parts["vae"].closed
