"""`wanexport stream`: what it writes, its record, and what is left of one that failed."""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from click.testing import CliRunner, Result

from tests.runtime.causal_engine import (
    CausalEngine,
    causal_denoiser,
    geometry_of,
    latent_of,
    text_of,
)
from tests.runtime.serving.test_streaming import Encoder, Streaming, Whole, alone
from tests.runtime.test_denoiser import denoiser as plain_denoiser
from wanexport.exporter.cli.main import cli
from wanexport.exporter.run import stream as module
from wanexport.runtime.bundle.tensorfile import load_arrays, save_arrays
from wanexport.runtime.parts.open import Parts
from wanexport.runtime.serving import pipeline as pipeline_module
from wanexport.runtime.serving.pipeline import Pipeline

GEOMETRY = geometry_of(9)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[CausalEngine]:
    """The small causal model in the place of a bundle's engine, with parts that stream."""
    denoiser, own = causal_denoiser(GEOMETRY)
    monkeypatch.setattr(pipeline_module, "load", lambda bundle, **_: denoiser)
    monkeypatch.setattr(module, "own_weights", lambda *_: {"base-fp32": "abc"})
    monkeypatch.setattr(module, "component_facts", lambda *_: {"components": {"origin": "here"}})
    monkeypatch.setattr(Parts, "find", lambda *_: None)
    monkeypatch.setattr(Parts, "vae", lambda self: Streaming())
    monkeypatch.setattr(Parts, "text_encoder", lambda self: Encoder())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bundle").mkdir()
    save_arrays(tmp_path / "text.safetensors", {"text": text_of(1)})
    yield own


def stream(*words: object) -> Result:
    return CliRunner().invoke(cli, ["stream", "bundle", *map(str, words)])


def latents_of(path: Path | str) -> np.ndarray:
    (latent,) = load_arrays(Path(path)).values()
    return latent


def test_a_latent_is_that_of_the_loop_and_its_record_repeats_it(engine: CausalEngine) -> None:
    words = ["--text", "text.safetensors", "--seed", 3, "-o", "x.safetensors"]
    done = stream(*words, "--window", 9, "--json")
    assert done.exit_code == 0, done.output
    latent = latents_of("x.safetensors")
    assert np.array_equal(latent, np.concatenate(alone("a", 3, window=9), axis=2))
    record = json.loads(Path("x.safetensors.json").read_text())
    assert record == json.loads(done.stdout)
    assert record["shape"] == [1, 16, 9, 4, 6] and len(record["chunk_seconds"]) == 3
    assert record["timesteps"] == pytest.approx([1000, 937.5, 833.3333, 625])
    assert (record["seed"], record["window"], record["frames"]) == (3, 9, 0)
    command = shlex.split(record["command"])
    again = CliRunner().invoke(cli, command[1:])
    assert again.exit_code == 0 and np.array_equal(latents_of("x.safetensors"), latent)
    refused = stream(*words)
    assert refused.exit_code and "exists: name another -o" in str(refused.exception)


@pytest.mark.parametrize("vae", [Streaming, Whole])
def test_a_prompt_becomes_a_video(
    vae: type[Whole], engine: CausalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = vae()
    monkeypatch.setattr(Parts, "vae", lambda self: codec)
    done = stream("--prompt", "a red circle", "--length", 17, "-o", "clip.mp4")
    assert done.exit_code == 0, done.output
    with av.open("clip.mp4") as container:
        assert sum(1 for _ in container.decode(video=0)) == 17
    record = json.loads(Path("clip.json").read_text())
    assert (record["frames"], record["prompt"], record["length"]) == (17, "a red circle", 17)
    assert "17 frames at 16 fps, height 32, width 48" in done.output
    assert sorted(path.name for path in Path().iterdir()) == [
        "bundle", "clip.json", "clip.mp4", "text.safetensors"
    ]  # fmt: skip


def test_frames_are_encoded_as_they_come(
    engine: CausalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file that becomes the clip is there before the last chunk is: two may wait for it."""
    seen: list[int] = []
    packets = Pipeline.stream

    def watched(self: Any, *arguments: Any, **options: Any) -> Iterator[Any]:
        for chunk in packets(self, *arguments, **options):
            partial = [path for path in Path().iterdir() if path.name.endswith(".partial")]
            seen.append(len(partial))
            yield chunk

    monkeypatch.setattr(Pipeline, "stream", watched)
    assert stream("--prompt", "a", "-o", "clip.mp4").exit_code == 0
    assert len(seen) == 4 and seen[-1] == 1


def test_given_frames_come_first(engine: CausalEngine) -> None:
    save_arrays(Path("first.safetensors"), {"latent": latent_of(GEOMETRY, 3, 8)})
    words = ["--text", "text.safetensors", "--initial", "first.safetensors"]
    done = stream(*words, "-o", "x.safetensors")
    assert done.exit_code == 0, done.output
    latent = latents_of("x.safetensors")
    assert latent.shape[2] == 9 and np.array_equal(latent[:, :, :3], latent_of(GEOMETRY, 3, 8))
    wrong = stream(
        "--text", "text.safetensors", "--initial", "text.safetensors", "-o", "y.safetensors"
    )
    assert "text.safetensors holds text: expected a latent" in str(wrong.exception)


def test_noise_of_the_file_stands_for_the_seeded_one(engine: CausalEngine) -> None:
    noise = latent_of(GEOMETRY, 6, 4)
    save_arrays(Path("own.safetensors"), {"text": text_of(1), "noise": noise})
    assert stream("--text", "own.safetensors", "-o", "x.safetensors").exit_code == 0
    assert latents_of("x.safetensors").shape[2] == 6
    save_arrays(Path("other.safetensors"), {"text": text_of(1), "image": noise})
    wrong = stream("--text", "other.safetensors", "-o", "y.safetensors")
    assert "expected text, and noise if it is given" in str(wrong.exception)


@pytest.mark.parametrize("output", ["clip.mp4", "x.safetensors"])
def test_what_was_made_before_a_failure_is_saved(output: str, engine: CausalEngine) -> None:
    run = type(engine).__call__

    class Failing(CausalEngine):
        def __call__(self, *arguments: Any, **named: Any) -> Any:
            self.fails = "step" if self.calls.count("commit") == 2 else ""
            return run(self, *arguments, **named)

    engine.__class__ = Failing
    done = stream("--prompt", "a", "-o", output)
    saved = "clip.safetensors" if output == "clip.mp4" else output
    assert str(done.exception) == f"it was asked to fail; the latent is saved as {saved}"
    assert np.array_equal(latents_of(saved), np.concatenate(alone("a", 0)[:2], axis=2))
    assert not Path("clip.mp4").exists() and not list(Path().glob("*.json"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prompt", "a", "-o", "x.gif"], "a video goes to an .mp4 file"),
        (["-o", "x.mp4"], "give one of --prompt TEXT and --text FILE"),
        (["--prompt", "a", "--length", 10, "-o", "x.mp4"], "a length of 10 frames is not legal"),
        (["--prompt", "a", "--length", 81, "-o", "x.mp4"], "cache of 9 frames is full at frame 9"),
        (["--prompt", "a", "--window", 3, "--sink", 1, "-o", "x.mp4"], "a window of 3 frames"),
        (["--prompt", "a", "--timesteps", "5,6", "-o", "x.mp4"], "timesteps are"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    words: list[object], said: str, engine: CausalEngine
) -> None:
    done = stream(*words)
    assert done.exit_code and said in str(done.exception), done.output
    assert not engine.calls
    assert sorted(path.name for path in Path().iterdir()) == ["bundle", "text.safetensors"]


def test_a_model_that_is_not_causal_is_refused(
    engine: CausalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline_module, "load", lambda bundle, **_: plain_denoiser()[0])
    done = stream("--prompt", "a", "-o", "x.mp4")
    assert "makes a video whole: use wanexport run" in str(done.exception)
