"""A picture in each of the forms that a caller may have one in, as RGB.

A form changes no pixel: what a file gives, its bytes, its PIL image and its array give too.
"""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import numpy as np

from wanexport.runtime.arrays import is_torch
from wanexport.runtime.bundle.regular_file import open_regular
from wanexport.runtime.errors import BadRequest, needing_extra, printable

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

# A path; the bytes of a file; a PIL image of any mode; or pixels in RGB, [H, W, 3], in uint8 or in
# floating point from 0 to 1.
Picture = Union[str, Path, bytes, np.ndarray, "Image", "Tensor"]

_FORMS = (
    "a path, the bytes of a PNG, JPEG or WebP file, a PIL image, or an array or tensor [H, W, 3] "
    "in uint8 or in floats from 0 to 1"
)
_MOST_PIXELS = 89_478_485  # of which Pillow warns; a file of kilobytes can claim more
_WHITE = 255
_WHITE_16 = 257  # what a 16-bit value is divided by to be an 8-bit one


def own_picture(picture: Picture | None, what: str) -> str | Path | bytes | np.ndarray | None:
    """The picture as what its owner can neither change nor close; what is how errors call it.

    A path stays one: its file is read later. A PIL image, array or tensor becomes uint8 [H, W, 3].
    Raises BadRequest, as `read_picture` does, for all but paths and bytes.
    """
    if picture is None or isinstance(picture, str | Path | bytes):
        return picture
    return np.asarray(read_picture(picture, what))


def read_picture(picture: Picture, what: str) -> "Image":
    """The picture in RGB, upright; what is how errors call one that is no file.

    Floats are rounded to 8 bits. Raises BadRequest when it is no picture, or has too many pixels,
    and WanExportError without Pillow.
    """
    with needing_extra("pipeline", "an image"):
        from PIL import Image
    if isinstance(picture, np.ndarray) or is_torch(picture):
        return Image.fromarray(_bytes_of(picture, what))
    if not isinstance(picture, str | Path | bytes | Image.Image):
        raise BadRequest(f"{what} is of type {type(picture).__name__}: expected {_FORMS}")
    try:
        return _rgb(picture) if isinstance(picture, Image.Image) else _decoded(picture)
    except MemoryError:
        raise
    except Exception as error:  # of any kind: Pillow's decoders trust much of what they read
        raise _unreadable(picture, what, error) from error


def picture_name(picture: Picture, what: str) -> str:
    """How a note calls a picture: by the name of its file, or as `what`."""
    return Path(picture).name if isinstance(picture, str | Path) else what


def _decoded(file: str | Path | bytes) -> "Image":
    from PIL import Image

    if isinstance(file, bytes):
        with Image.open(io.BytesIO(file)) as picture:
            return _rgb(picture)
    path = Path(file)
    if path.is_dir():
        raise ValueError("Is a directory")
    with open(open_regular(path), "rb") as stream, Image.open(stream) as picture:
        return _rgb(picture)


def _rgb(picture: "Image") -> "Image":
    """A copy in RGB, upright. Raises ValueError for too many pixels, or for those without white."""
    from PIL import Image, ImageOps

    _check_pixels(picture.height, picture.width)
    upright = ImageOps.exif_transpose(picture)
    if upright.mode.startswith("I;16"):  # which convert() would clip
        grey = np.asarray(upright).astype(np.uint16) // _WHITE_16
        upright = Image.fromarray(grey.astype(np.uint8))
    elif upright.mode in ("I", "F"):
        raise ValueError("its pixels have no fixed white")
    return upright.convert("RGB")


def _check_pixels(height: int, width: int) -> None:
    if not 0 < height * width <= _MOST_PIXELS:
        raise ValueError(
            f"it has {height}x{width} pixels, expected at most {_MOST_PIXELS}: scale it first"
        )


def _unreadable(picture: "str | Path | bytes | Image", what: str, error: Exception) -> BadRequest:
    from PIL import UnidentifiedImageError

    reason: str = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if isinstance(error, UnidentifiedImageError):
        reason = "it is none"
    expected = "a PNG, JPEG or WebP file"
    if isinstance(picture, str | Path):
        what = printable(Path(picture))
    elif isinstance(picture, bytes):
        what, expected = f"{what}, {len(picture)} bytes,", f"those of {expected}"
    else:
        what, expected = f"{what}, a PIL image in mode {picture.mode},", "one to convert to RGB"
    return BadRequest(f"cannot read {what} as an image ({printable(reason)}): expected {expected}")


def _bytes_of(picture: Any, what: str) -> np.ndarray:
    """The pixels of an array or tensor as uint8 [H, W, 3]."""
    shape, dtype = tuple(picture.shape), str(picture.dtype).removeprefix("torch.")
    if len(shape) != 3 or shape[2] != 3 or 0 in shape:
        raise BadRequest(f"{what} has shape {list(shape)}: expected [H, W, 3], its rows first")
    is_float = picture.is_floating_point() if is_torch(picture) else picture.dtype.kind == "f"
    if dtype != "uint8" and not is_float:
        raise BadRequest(f"{what} is {dtype}: expected uint8, or floats from 0 to 1")
    try:
        _check_pixels(*shape[:2])
    except ValueError as error:
        raise BadRequest(f"cannot read {what} as an image: {error}") from error
    if is_torch(picture):
        picture = (picture.detach().float() if is_float else picture.detach()).cpu().numpy()
    return _rounded(picture, what) if is_float else np.ascontiguousarray(picture)


def _rounded(values: np.ndarray, what: str) -> np.ndarray:
    """Floats from 0 to 1 as 8-bit numbers."""
    least, most = values.min(), values.max()
    if not (least >= 0 and most <= 1):  # nor is NaN
        raise BadRequest(f"{what} has values from {least:g} to {most:g}: expected from 0 to 1")
    return np.rint(values.astype(np.float32) * _WHITE).astype(np.uint8)
