"""An mp4 file read back: frames, rate, colours; and nothing left of one that failed."""

import sys
import threading
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from wanexport.runtime.errors import BadRequest, WanExportError
from wanexport.runtime.serving import video
from wanexport.runtime.serving.video import write_chunks, write_video


def smooth_clip(frames: int = 17, height: int = 48, width: int = 80) -> np.ndarray:
    """Colours that change slowly over the picture and move."""
    t, y, x = np.meshgrid(*(np.arange(n) for n in (frames, height, width)), indexing="ij")
    waves = [np.sin((x + t) / 20), np.cos((y - t) / 15), np.sin((x + y) / 30)]
    return np.stack([np.uint8(127.5 + 120 * wave) for wave in waves], axis=-1)


def read(path: Path) -> tuple[Any, list[Any]]:
    """The stream's facts and all decoded frames."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return stream, list(container.decode(stream))


def rgb(planes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Limited range YCbCr 4:2:0 to RGB, by the inverse of ITU-R BT.709, item 3."""
    luma = (planes[:height] - 16.0) * 255 / 219
    blue, red = (planes[height:].reshape(2, height // 2, width // 2) - 128.0) * 255 / 224
    blue, red = (plane.repeat(2, axis=0).repeat(2, axis=1) for plane in (blue, red))
    return np.stack(
        [luma + 1.5748 * red, luma - 0.1873 * blue - 0.4681 * red, luma + 1.8556 * blue], -1
    )


@pytest.mark.parametrize("fps", [16, 24])
def test_what_is_read_back_is_what_was_written(tmp_path: Path, fps: int) -> None:
    clip = smooth_clip()
    write_video(tmp_path / "clip.mp4", clip, fps)
    stream, frames = read(tmp_path / "clip.mp4")
    assert (stream.codec_context.name, frames[0].format.name) == ("h264", "yuv420p")
    assert (stream.average_rate, stream.frames) == (fps, 17)
    assert [frame.time for frame in frames] == [float(Fraction(n, fps)) for n in range(17)]
    found = np.stack([rgb(frame.to_ndarray(), 48, 80) for frame in frames])
    assert found.shape == clip.shape
    psnr = 10 * np.log10(255**2 / ((found - clip) ** 2).mean(axis=(1, 2, 3)))
    assert (psnr > 35).all()


def test_a_path_may_be_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # Where a row is not of 8 macroblocks, x264's mbtree gives other bytes now and then.
    clip = smooth_clip(5, 64, 128)
    write_video("text.mp4", clip, 16)
    write_video(Path("path.mp4"), clip, 16)
    assert Path("text.mp4").read_bytes() == Path("path.mp4").read_bytes()
    with pytest.raises(BadRequest, match="path is empty"):
        write_video("", clip, 16)


def test_one_frame_is_a_video(tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", smooth_clip(1), 16)
    assert len(read(tmp_path / "clip.mp4")[1]) == 1


def test_colours_are_bt709s_and_marked_so(tmp_path: Path) -> None:
    """Luma of limited range, 16 + 219 (0.2126 R + 0.7152 G + 0.0722 B): ITU-R BT.709, item 3."""
    clip = np.zeros((3, 32, 32, 3), np.uint8)
    for frame, channel in zip(clip, range(3), strict=True):
        frame[..., channel] = 255
    write_video(tmp_path / "clip.mp4", clip, 16)
    stream, frames = read(tmp_path / "clip.mp4")
    luma = [frame.to_ndarray()[:32].mean() for frame in frames]
    np.testing.assert_allclose(luma, [62.6, 172.6, 31.8], atol=1.5)
    context = stream.codec_context
    marks = (context.colorspace, context.color_primaries, context.color_trc, context.color_range)
    assert [int(mark) for mark in marks] == [1, 1, 1, 1]


def test_a_player_need_not_wait_for_the_end(tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", smooth_clip(), 16)
    content = (tmp_path / "clip.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")


def test_a_failure_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"the last one")
    real = video._packets

    def fail(*arguments: Any) -> Any:
        yield next(real(*arguments))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(video, "_packets", fail)
    with pytest.raises(WanExportError, match=r"cannot write .*clip\.mp4: No space left on device"):
        write_video(path, smooth_clip(), 16)
    assert path.read_bytes() == b"the last one"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(WanExportError, match=r"cannot write .*: No such file or directory$"):
        write_video(tmp_path / "none" / "clip.mp4", smooth_clip(1), 16)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.zeros((1, 33, 32, 3), np.uint8), "33x32 are no H.264 video: expected even sides"),
        (np.zeros((1, 32, 33, 3), np.uint8), "32x33 are no H.264 video: expected even sides"),
        (np.zeros((1, 32, 32, 3), np.float32), r"float32 .* expected uint8 \[F, H, W, 3\]"),
        (np.zeros((1, 3, 32, 32), np.uint8), r"expected uint8 \[F, H, W, 3\]"),
        (np.zeros((0, 32, 32, 3), np.uint8), r"expected uint8 \[F, H, W, 3\]"),
        (np.zeros((32, 32, 3), np.uint8), r"expected uint8 \[F, H, W, 3\]"),
        (None, r"type NoneType: expected uint8 \[F, H, W, 3\]"),
    ],
)
def test_what_is_no_clip_is_refused(tmp_path: Path, frames: Any, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        write_video(tmp_path / "clip.mp4", frames, 16)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(WanExportError, match=r"needs av; from a clone .*'.\[pipeline\]'$"):
        write_video(tmp_path / "clip.mp4", smooth_clip(1), 16)


def test_chunks_are_one_video(tmp_path: Path) -> None:
    clip = smooth_clip(17, 64, 128)
    write_video(tmp_path / "whole.mp4", clip, 16)
    write_chunks(tmp_path / "chunks.mp4", iter([clip[:1], clip[1:9], clip[9:]]), 16)
    assert (tmp_path / "chunks.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


def test_a_chunk_is_encoded_while_the_next_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each chunk is made only once a frame of the one before has reached the encoder."""
    clip, encoding = smooth_clip(12), [threading.Event() for _ in range(12)]
    real = video._packets

    def watched(frames: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        for event, frame in zip(encoding, frames, strict=False):
            event.set()
            yield frame

    def packets(container: Any, size: Any, frames: Any, fps: int) -> Any:
        return real(container, size, watched(frames), fps)

    def chunks() -> Iterator[np.ndarray]:
        for begin in range(0, 12, 4):
            if begin:
                assert encoding[begin - 4].wait(10)
            yield clip[begin : begin + 4]

    monkeypatch.setattr(video, "_packets", packets)
    write_chunks(tmp_path / "clip.mp4", chunks(), 16)
    assert len(read(tmp_path / "clip.mp4")[1]) == 12


class Ended(Exception):
    pass


@pytest.mark.parametrize("chunks_before", [0, 1, 3])
def test_chunks_that_fail_leave_what_was_there(chunks_before: int, tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"the last one")

    def chunks() -> Iterator[np.ndarray]:
        yield from [smooth_clip(4)] * chunks_before
        raise Ended

    with pytest.raises(Ended):
        write_chunks(path, chunks(), 16)
    assert path.read_bytes() == b"the last one" and list(tmp_path.iterdir()) == [path]
    assert "wanexport video" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize("last", [1, 2, 3])
def test_a_check_ends_the_writing_even_when_all_is_encoded(last: int, tmp_path: Path) -> None:
    """Of two chunks: after each, and before the file has its name."""
    checks: list[int] = []

    def check() -> None:
        checks.append(len(checks))
        if len(checks) == last:
            raise Ended

    with pytest.raises(Ended):
        write_chunks(tmp_path / "clip.mp4", [smooth_clip(4)] * 2, 16, check)
    assert not list(tmp_path.iterdir())


def test_an_encoder_that_fails_is_one_line_and_stops_the_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    made: list[int] = []

    def chunks() -> Iterator[np.ndarray]:
        for index in range(50):
            made.append(index)
            yield smooth_clip(1)

    monkeypatch.setattr(video, "_packets", refuse)
    with pytest.raises(WanExportError, match=r"cannot write .*clip\.mp4: No space left on device"):
        write_chunks(tmp_path / "clip.mp4", chunks(), 16)
    assert not list(tmp_path.iterdir()) and len(made) < 10


def test_no_chunks_are_no_video(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="there are no frames"):
        write_chunks(tmp_path / "clip.mp4", [], 16)
    with pytest.raises(BadRequest, match="expected even sides"):
        write_chunks(tmp_path / "clip.mp4", [np.zeros((1, 33, 32, 3), np.uint8)], 16)
    assert not list(tmp_path.iterdir())
