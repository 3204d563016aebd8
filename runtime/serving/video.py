"""Write frames as an mp4 file that plays everywhere: H.264 in yuv420p, colours of BT.709."""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from wanexport.runtime.bundle.durable import durable_file
from wanexport.runtime.errors import (
    BadRequest,
    WanExportError,
    explain,
    needing_extra,
    refuse_empty,
)
from wanexport.runtime.serving.handing import Handing

# x264's rate factor. The official code asks imageio for quality 8 of 10, which is this.
CRF = 10
_BT709 = 1  # the number in ITU-T H.273 of its matrix, primaries and transfer function


def write_video(path: str | Path, frames: np.ndarray, fps: int) -> None:
    """Write frames, uint8 [F, H, W, 3] in RGB, at `fps` a second; the file appears whole or not.

    Raises BadRequest for another dtype or shape, and for an odd side, which yuv420p does not have;
    WanExportError when PyAV is missing, and when the file cannot be written.
    """
    path = _place(path)
    _write(path, _checked([frames]), fps, lambda: None)


def write_chunks(
    path: str | Path,
    chunks: Iterable[np.ndarray],
    fps: int,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Write chunks of frames, one after the other, while the next ones are made.

    A thread encodes, a chunk or two behind the caller's. check is called after each chunk and, by
    that thread, when all is encoded: what it raises ends the writing. Whatever fails, there is the
    whole file or what was there before.
    Raises as `write_video` does for every chunk, and what chunks and check raise.
    """
    path = _place(path)

    def check_end() -> None:
        handing.check()
        check()

    def encode(handed: Iterator[np.ndarray]) -> None:
        _write(path, handed, fps, check_end)

    with Handing(encode, "wanexport video") as handing:
        for frames in _checked(chunks):
            handing.give(frames)
            check()


def check_video(path: str | Path) -> Path:
    """The path of a video that is to be written. Raises BadRequest for one that is no .mp4, and
    WanExportError when PyAV is missing."""
    path = _place(path)
    if path.suffix.lower() != ".mp4":
        raise BadRequest(f"{path} is no .mp4 file: name one for the video")
    return path


def _place(path: str | Path) -> Path:
    refuse_empty(path=path)
    with needing_extra("pipeline", "an .mp4 file"):
        import av  # noqa: F401
    return Path(path)


def _checked(chunks: Iterable[Any]) -> Iterator[np.ndarray]:
    """The chunks, each found to be frames of one video."""
    sides: tuple[int, ...] = ()
    for frames in chunks:
        if not isinstance(frames, np.ndarray):  # but None, of a request that was not decoded
            found = f"of type {type(frames).__name__}"
            raise BadRequest(f"frames are {found}: expected uint8 [F, H, W, 3]")
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not frames.size:
            raise BadRequest(
                f"frames are {frames.dtype} {list(frames.shape)}: expected uint8 [F, H, W, 3]"
            )
        if frames.shape[1] % 2 or frames.shape[2] % 2:
            raise BadRequest(
                f"frames of {frames.shape[1]}x{frames.shape[2]} are no H.264 video: "
                f"expected even sides, cut off a row or column"
            )
        if sides and frames.shape[1:3] != sides:
            raise BadRequest(
                f"frames of {list(frames.shape)} follow some of {list(sides)}: expected one size"
            )
        sides = frames.shape[1:3]
        yield frames


def _write(path: Path, chunks: Iterator[np.ndarray], fps: int, check: Callable[[], None]) -> None:
    """Encode into a file that takes its name when there is no more to come and check lets it."""
    import av

    first = next(chunks, None)  # before there is a file: what is no video touches nothing
    if first is None:
        raise BadRequest("there are no frames: expected uint8 [F, H, W, 3]")
    frames = chain.from_iterable(chain([first], chunks))
    try:
        # FFmpeg opens the file by its name again: to put the index first it reads what it wrote.
        with durable_file(path) as file:
            with av.open(
                file.name, "w", format="mp4", options={"movflags": "faststart"}
            ) as container:
                for packet in _packets(container, first.shape[1:3], frames, fps):
                    container.mux(packet)
            check()
    except (OSError, av.error.FFmpegError) as error:
        # FFmpeg's errors are partly the system's, and name the file that this one was to replace.
        reason = OSError(error.errno, error.strerror or type(error).__name__)
        raise WanExportError(f"cannot write {path}: {explain(reason)}") from error


def _packets(
    container: Any, size: tuple[int, ...], frames: Iterable[np.ndarray], fps: int
) -> Iterator[Any]:
    """Add a video stream to the container, and yield its encoded packets."""
    import av

    stream = container.add_stream("libx264", rate=fps, options={"crf": str(CRF)})
    stream.height, stream.width = size
    stream.pix_fmt = "yuv420p"
    context = stream.codec_context
    context.colorspace = context.color_primaries = context.color_trc = _BT709
    for frame in frames:
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        yield from stream.encode(picture.reformat(format="yuv420p", dst_colorspace="ITU709"))
    yield from stream.encode(None)
