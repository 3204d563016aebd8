"""A request whose video goes to a file: written while it is decoded, whole or not at all."""

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.runtime.serving.test_pipeline import Codec, Encoder, Engine, denoiser_of
from wanexport.runtime.arrays import is_on_gpu, is_torch
from wanexport.runtime.bundle.pinned_file import PinnedFile
from wanexport.runtime.engines.engine import Memory
from wanexport.runtime.errors import BadRequest, EngineFailure, WanExportError
from wanexport.runtime.serving import pipeline as pipeline_module
from wanexport.runtime.serving import video as video_module
from wanexport.runtime.serving.pipeline import Pipeline
from wanexport.runtime.serving.video import write_video

SECONDS = 10
Open = Callable[..., Pipeline]


class Chunks(Codec):
    """Frames of 64x96 in four chunks, which follow from the latent; `before` sees each's number."""

    def __init__(self, before: Callable[[int], object] = lambda number: None) -> None:
        super().__init__()
        self.before = before

    def decode(self, latent: Any) -> np.ndarray:
        return np.concatenate(list(self.decode_chunks(latent)))

    def decode_chunks(self, latent: Any) -> Iterator[np.ndarray]:
        shade = int(abs(float(latent.sum())) * 7) % 200
        latent[:] = 0
        for number in range(4):
            self.before(number)
            yield np.full((2, 64, 96, 3), shade + 10 * number, np.uint8)


@pytest.fixture
def open_pipeline(monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    opened: list[Pipeline] = []

    def open_one(vae: Any, engine: Engine | None = None) -> Pipeline:
        monkeypatch.setattr(
            pipeline_module, "load", lambda bundle: denoiser_of("tiny", engine or Engine())
        )
        opened.append(Pipeline("bundle", text_encoder=Encoder(), vae=vae))
        return opened[-1]

    yield open_one
    for pipeline in opened:
        pipeline.close()


def test_the_file_is_that_of_the_frames(open_pipeline: Open, tmp_path: Path) -> None:
    pipeline = open_pipeline(Chunks())
    asked: dict[str, Any] = {"seed": 3, "steps": 2}
    made = pipeline.generate("one", **asked)
    assert made.video is not None
    write_video(tmp_path / "frames.mp4", made.video, made.fps)
    direct = pipeline.generate("one", **asked, output=tmp_path / "direct.mp4")
    assert direct.video is None and direct.seconds["decode"] > 0
    np.testing.assert_array_equal(direct.latent, made.latent)
    pipeline.submit("one", **asked, output=str(tmp_path / "job.mp4")).result(SECONDS)
    found = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(found) == 3 and len(set(found.values())) == 1


def test_a_codec_of_the_callers_own_needs_no_chunks(open_pipeline: Open, tmp_path: Path) -> None:
    made = open_pipeline(Codec()).generate("one", steps=1, output=tmp_path / "clip.mp4")
    assert made.video is None and (tmp_path / "clip.mp4").stat().st_size


def test_a_chunk_is_with_the_encoder_before_the_next_is_decoded(
    open_pipeline: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoding = [threading.Event() for _ in range(4)]
    real = video_module._packets

    def packets(container: Any, size: Any, frames: Any, fps: int) -> Any:
        def watched() -> Iterator[np.ndarray]:
            for index, frame in enumerate(frames):
                encoding[index // 2].set()
                yield frame

        return real(container, size, watched(), fps)

    def before(number: int) -> None:
        assert number == 0 or encoding[number - 1].wait(SECONDS)

    monkeypatch.setattr(video_module, "_packets", packets)
    open_pipeline(Chunks(before)).generate("one", steps=1, output=tmp_path / "clip.mp4")
    assert all(event.is_set() for event in encoding)


@pytest.mark.parametrize("number", [0, 2, 3])
def test_a_cancel_while_it_decodes_leaves_nothing(
    number: int, open_pipeline: Open, tmp_path: Path
) -> None:
    reached, go_on = threading.Event(), threading.Event()

    def before(now: int) -> None:
        if now == number:
            reached.set()
            assert go_on.wait(SECONDS)

    pipeline = open_pipeline(Chunks(before))
    job = pipeline.submit("one", steps=1, output=tmp_path / "clip.mp4")
    assert reached.wait(SECONDS)
    assert job.cancel()
    go_on.set()
    with pytest.raises(CancelledError):
        job.result(SECONDS)
    assert not list(tmp_path.iterdir())
    pipeline.generate("one", steps=1, output=tmp_path / "clip.mp4")  # and the next is served


@pytest.mark.parametrize("number", [0, 1, 3])
def test_a_decoder_that_fails_leaves_what_was_there(
    number: int, open_pipeline: Open, tmp_path: Path
) -> None:
    def before(now: int) -> None:
        if now == number:
            raise EngineFailure("no memory")

    (tmp_path / "clip.mp4").write_bytes(b"the last one")
    with pytest.raises(EngineFailure, match=r"^no memory$"):
        open_pipeline(Chunks(before)).generate("one", steps=1, output=tmp_path / "clip.mp4")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"the last one"]


def test_an_encoder_that_fails_is_one_line_and_leaves_nothing(
    open_pipeline: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    pipeline = open_pipeline(Chunks())
    with monkeypatch.context() as patch:
        patch.setattr(video_module, "_packets", refuse)
        with pytest.raises(WanExportError, match=r"^cannot write .*: No space left on device"):
            pipeline.generate("one", steps=1, output=tmp_path / "clip.mp4")
    assert not list(tmp_path.iterdir())
    pipeline.generate("one", steps=1, output=tmp_path / "clip.mp4")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"output": "{tmp}/clip.gif"}, r"clip\.gif is no \.mp4 file"),
        ({"output": ""}, "output is empty|path is empty"),
        ({"output": "{tmp}/none/clip.mp4"}, r"cannot write .*No such file or directory\): name a"),
        ({"output": "{tmp}/clip.mp4", "decode": False}, "leave decode=False out"),
    ],
)
def test_an_output_that_cannot_be_is_refused_before_any_work(
    asked: dict[str, Any], message: str, open_pipeline: Open, tmp_path: Path
) -> None:
    engine = Engine()
    pipeline = open_pipeline(Chunks(), engine)
    asked = {**asked, "output": asked["output"].format(tmp=tmp_path)}
    with pytest.raises(BadRequest, match=message):
        pipeline.generate("one", steps=1, **asked)
    with pytest.raises(BadRequest, match="takes one video, not those of 2 seeds"):
        pipeline.generate_seeds("one", [1, 2], steps=1, output=tmp_path / "clip.mp4")
    assert engine.calls == 0 and not list(tmp_path.iterdir())


_SEEN: list[str] = []  # what was done to tensors that stand for a GPU's
_FINDINGS = 8  # values: what is found of a latent may leave, and what seeds a solver
_LEAVING = {"cpu", "numpy", "tolist", "item", "__array__", "__bool__", "__float__"}


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU, and notes what would take it to the host."""

    is_cuda = True

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in _LEAVING and args[0].numel() > _FINDINGS:
            _SEEN.append(name)
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


class GpuEngine(Engine):
    """An engine whose arrays are such tensors."""

    def array(self, value: Any) -> Any:
        tensor = value if is_torch(value) else torch.from_numpy(np.array(value, np.float32))
        return tensor.as_subclass(OnGpu)

    def __call__(
        self,
        inputs: Mapping[str, Any],
        weights: PinnedFile | None = None,
        memory: Memory | None = None,
        moment: str = "step",
    ) -> Any:
        return inputs["latent"] / 2 + inputs["text"].mean()


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler", "renoise"])
def test_a_latent_on_a_gpu_stays_there_from_noise_to_pixels(
    solver: str, open_pipeline: Open, tmp_path: Path
) -> None:
    given: list[Any] = []

    class Looking(Chunks):
        def decode_chunks(self, latent: Any) -> Iterator[np.ndarray]:
            given.append(latent)
            assert not _SEEN
            yield from super().decode_chunks(latent.as_subclass(torch.Tensor))

    engine = GpuEngine()
    _SEEN.clear()
    pipeline = open_pipeline(Looking(), engine)
    asked: dict[str, Any] = {"seed": 3, "steps": 3, "solver": solver}
    made = pipeline.generate("one", **asked, output=tmp_path / "clip.mp4")
    assert is_on_gpu(given[0])
    expected = open_pipeline(Codec()).generate("one", **asked)
    np.testing.assert_allclose(made.latent, expected.latent, atol=1e-5)
