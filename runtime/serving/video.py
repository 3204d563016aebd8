"""Write frames as an mp4 file that plays everywhere: H.264 in yuv420p, colours of BT.709."""

from collections.abc import Iterable, Iterator
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

# x264's rate factor. The official code asks imageio for quality 8 of 10, which is this.
CRF = 10
_BT709 = 1  # the number in ITU-T H.273 of its matrix, primaries and transfer function


def write_video(path: str | Path, frames: np.ndarray, fps: int) -> None:
    """Write frames, uint8 [F, H, W, 3] in RGB, at `fps` a second; the file appears whole or not.

    Raises BadRequest for another dtype or shape, and for an odd side, which yuv420p does not have;
    WanExportError when PyAV is missing, and when the file cannot be written.
    """
    _check(frames)
    write_parts(path, [frames], fps)


def write_parts(path: str | Path, parts: Iterable[np.ndarray], fps: int) -> None:
    """Write the frames of parts, each as `write_video` takes them, as they come. The file appears
    when the last one is written, and not when one fails.

    Raises what `write_video` does, and what the parts raise.
    """
    refuse_empty(path=path)
    path = Path(path)
    with needing_extra("pipeline", "an .mp4 file"):
        import av
    try:
        # FFmpeg opens the file by its name again: to put the index first it reads what it wrote.
        with (
            durable_file(path) as file,
            av.open(file.name, "w", format="mp4", options={"movflags": "faststart"}) as container,
        ):
            for packet in _packets(container, _checked(parts), fps):
                container.mux(packet)
    except (OSError, av.error.FFmpegError) as error:
        # FFmpeg's errors are partly the system's, and name the file that this one was to replace.
        reason = OSError(error.errno, error.strerror or type(error).__name__)
        raise WanExportError(f"cannot write {path}: {explain(reason)}") from error


def _checked(parts: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Each frame; raises BadRequest for a part that is none, and where there is no frame at all."""
    sides: tuple[int, ...] = ()
    for part in parts:
        _check(part)
        if sides and part.shape[1:3] != sides:
            raise BadRequest(
                f"frames of {list(part.shape)} follow some of {list(sides)}: expected one size"
            )
        sides = part.shape[1:3]
        yield from part
    if not sides:
        raise BadRequest("there are no frames to write: expected one or more")


def _check(frames: np.ndarray) -> None:
    if not isinstance(frames, np.ndarray):  # but None, of a request that was not decoded
        raise BadRequest(f"frames are of type {type(frames).__name__}: expected uint8 [F, H, W, 3]")
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not frames.size:
        raise BadRequest(
            f"frames are {frames.dtype} {list(frames.shape)}: expected uint8 [F, H, W, 3]"
        )
    if frames.shape[1] % 2 or frames.shape[2] % 2:
        raise BadRequest(
            f"frames of {frames.shape[1]}x{frames.shape[2]} are no H.264 video: "
            f"expected even sides, cut off a row or column"
        )


def _packets(container: Any, frames: Iterator[np.ndarray], fps: int) -> Iterator[Any]:
    """Add a video stream to the container, and yield its encoded packets."""
    import av

    stream = None
    for frame in frames:
        if stream is None:
            stream = container.add_stream("libx264", rate=fps, options={"crf": str(CRF)})
            stream.height, stream.width = frame.shape[:2]
            stream.pix_fmt = "yuv420p"
            context = stream.codec_context
            context.colorspace = context.color_primaries = context.color_trc = _BT709
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        yield from stream.encode(picture.reformat(format="yuv420p", dst_colorspace="ITU709"))
    if stream is not None:
        yield from stream.encode(None)
