"""From the user's pictures to the engine's image inputs.

As in Wan2.1's `image2video.py` and `first_last_frame2video.py` and Wan2.2's `image2video.py` and
`textimage2video.py`, but for the size: the original derives it from the picture, an engine has one,
so the picture is cut to the engine's shape unless that is what the original would have derived.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING

import numpy as np

from wanexport.runtime.arrays import Array, is_torch
from wanexport.runtime.bundle.manifest import EngineRecord
from wanexport.runtime.errors import BadRequest, needing_extra
from wanexport.runtime.family import family_named
from wanexport.runtime.geometry import PATCH, TEMPORAL_STRIDE, Geometry
from wanexport.runtime.parts.picture_reading import Picture, picture_name, read_picture
from wanexport.runtime.parts.protocols import ImageEncoder, VideoCodec

if TYPE_CHECKING:
    from PIL.Image import Image

# Areas of the official --size, by resampling: image-to-video's and TI2V's.
_OFFICIAL_AREAS = {"bicubic": (480 * 832, 720 * 1280), "lanczos": (704 * 1280,)}
_LEAST_SHARE = 0.9  # of such an area, after both sides were floored


@dataclass(frozen=True)
class FittedImage:
    """A picture cut to the engine's shape; values are fp32 in [-1, 1].

    `pixels` [3, height, width] are what the VAE encodes. `shown` [3, h, w] is the same part of the
    picture at its own size, which CLIP is given. `note` says what was done, and is empty when
    nothing was.
    """

    pixels: np.ndarray
    shown: np.ndarray
    note: str


def takes_image(record: EngineRecord) -> bool:
    """Whether the model can be given a first image: one that blends it needs frames after it."""
    family = family_named(record.family)
    is_too_short = family.blends_first_frame and record.geometry.frames == 1
    return "first" in family.takes and not is_too_short


def takes_last_image(record: EngineRecord) -> bool:
    """Whether the model goes from a first to a last image, and needs both."""
    return "last" in family_named(record.family).takes


def fit_images(
    record: EngineRecord, image: Picture | None, last_image: Picture | None = None
) -> list[FittedImage]:
    """The pictures that a run was given, fitted to the engine's shape; none for text alone.

    Raises BadRequest when the model takes no image, needs one that is missing, or what was given is
    no picture.
    """
    _check_images(record, image is not None, last_image is not None)
    resample = "lanczos" if family_named(record.family).blends_first_frame else "bicubic"
    given = {"image": image, "last_image": last_image}
    return [
        fit_image(
            picture, record.geometry, resample=resample, tells_size=what == "image", what=what
        )
        for what, picture in given.items()
        if picture is not None
    ]


def _check_images(record: EngineRecord, has_first: bool, has_last: bool) -> None:
    name = record.name
    if has_first and not takes_image(record):
        takes = "first" in family_named(record.family).takes
        reason = "makes a single frame" if takes else "is text-to-video"
        raise BadRequest(f"engine {name} {reason} and takes no image: leave out the image")
    if has_last and not takes_last_image(record):
        raise BadRequest(
            f"engine {name} takes no last image: leave out the last image, or build a "
            f"first-last-frame model (Wan-AI/Wan2.1-FLF2V-14B-720P)"
        )
    needs = family_named(record.family).needs
    if "first" in needs and not has_first:
        raise BadRequest(f"engine {name} is image-to-video: give it a first image (--image)")
    if "last" in needs and not has_last:
        raise BadRequest(
            f"engine {name} goes from a first to a last image: give it that too (--last-image)"
        )
    if "last" in needs and record.geometry.frames == 1:
        raise BadRequest(
            f"engine {name} has one frame for a first and a last image: build one of 5 frames"
        )


def fit_image(
    picture: Picture,
    geometry: Geometry,
    *,
    resample: str,
    tells_size: bool = True,
    what: str = "image",
) -> FittedImage:
    """Cut the middle of a picture to the geometry's aspect and scale it, as the official code does.

    resample is `bicubic` (image-to-video: torch's, without antialiasing) or `lanczos` (TI2V: scaled
    to cover the video, then cut). A picture from which image-to-video's official code would have
    derived the geometry's size is squeezed to it whole, as there. tells_size: whether the note
    names the resolution that the official code would have derived from this picture. what is how
    the note and errors call a picture that is no file.
    Raises BadRequest when it is no picture.
    """
    rgb = read_picture(picture, what)
    own, wanted = (rgb.height, rgb.width), (geometry.height, geometry.width)
    squeezes = resample == "bicubic" and _official_size(own, geometry, resample) == wanted
    top, left, height, width = (0, 0, *own) if squeezes else _middle(*own, geometry)
    shown = _values(rgb.crop((left, top, left + width, top + height)))
    pixels = _lanczos(rgb, geometry) if resample == "lanczos" else _bicubic(shown, geometry)
    name = picture_name(picture, what)
    note = _note(name, own, (height, width), geometry, resample if tells_size else "")
    return FittedImage(pixels, shown, note)


def _middle(height: int, width: int, geometry: Geometry) -> tuple[int, int, int, int]:
    """Top, left, height and width of the largest centred part with the geometry's aspect."""
    scale = min(height / geometry.height, width / geometry.width)
    cut_height = max(1, min(height, round(geometry.height * scale)))
    cut_width = max(1, min(width, round(geometry.width * scale)))
    return (height - cut_height) // 2, (width - cut_width) // 2, cut_height, cut_width


def _values(picture: "Image") -> np.ndarray:
    """The picture as [3, H, W] in fp32, from -1 to 1."""
    values = np.empty((3, picture.height, picture.width), np.float32)
    values[:] = np.asarray(picture).transpose(2, 0, 1)
    values /= np.float32(255)  # in place: a large picture's copies would take gigabytes
    values -= np.float32(0.5)
    values /= np.float32(0.5)
    return values


def _bicubic(shown: np.ndarray, geometry: Geometry) -> np.ndarray:
    with needing_extra("pipeline", "an image"):
        import torch
    scaled = torch.nn.functional.interpolate(
        torch.from_numpy(shown)[None], size=(geometry.height, geometry.width), mode="bicubic"
    )
    return np.ascontiguousarray(scaled[0].numpy())


def _lanczos(picture: "Image", geometry: Geometry) -> np.ndarray:
    from PIL.Image import Resampling

    scale = max(geometry.width / picture.width, geometry.height / picture.height)
    size = (round(picture.width * scale), round(picture.height * scale))
    scaled = picture.resize(size, Resampling.LANCZOS)
    left, top = (size[0] - geometry.width) // 2, (size[1] - geometry.height) // 2
    return _values(scaled.crop((left, top, left + geometry.width, top + geometry.height)))


def _note(
    name: str, own: tuple[int, int], cut: tuple[int, int], geometry: Geometry, resample: str
) -> str:
    """What was done to a picture of its own size, in one sentence; resample is empty to leave out
    the size that the official code would have chosen."""
    wanted = (geometry.height, geometry.width)
    done = []
    if cut != own:
        done.append(f"was cut to its middle {_size(cut)}")
    if cut != wanted:
        done.append(f"{'' if done else 'was '}scaled to {_size(wanted)}")
    if resample:
        official = _official_size(own, geometry, resample)
        if official != wanted:
            done.append(f"would have made the official code choose {_size(official)}")
    if not done:
        return ""
    *first, last = done
    clauses = f"{', '.join(first)} and {last}" if first else last
    return f"{name}, {_size(own)} pixels (height x width), {clauses}"


def _size(sides: tuple[int, int]) -> str:
    return f"{sides[0]}x{sides[1]}"


def _official_size(
    picture: tuple[int, int], geometry: Geometry, resample: str
) -> tuple[int, int]:  # fmt: skip
    """Height and width that the official code derives from a picture.

    Its area is that of the official size which the engine's shape may have been floored from, else
    the engine's own.
    """
    own, side = geometry.height * geometry.width, PATCH * geometry.spatial_stride
    areas = _OFFICIAL_AREAS[resample]
    area = next((area for area in areas if _LEAST_SHARE * area < own <= area), own)
    if resample == "lanczos":
        return _best_output_size(picture, area, side)
    ratio = picture[0] / picture[1]
    # Floored to whole patches of latent pixels: 480 becomes 464, its root being a hair too small.
    return int(sqrt(area * ratio) // side) * side, int(sqrt(area / ratio) // side) * side


def _best_output_size(picture: tuple[int, int], area: int, side: int) -> tuple[int, int]:
    """TI2V's: height and width in multiples of side, within area, nearest to the picture's ratio.

    `best_output_size` in Wan2.2's `wan/utils/utils.py`: one side is floored, and the other takes
    what the area leaves.
    """
    ratio = picture[1] / picture[0]
    width = sqrt(area * ratio)

    def floored(length: float) -> int:
        return max(side, int(length // side) * side)

    wide = (floored(area / floored(width)), floored(width))
    high = (floored(area / width), floored(area / floored(area / width)))

    def strain(sides: tuple[int, int]) -> float:
        """How far the sides are from the ratio, as a factor."""
        factor = sides[1] / sides[0] / ratio
        return max(factor, 1 / factor)

    return wide if strain(wide) < strain(high) else high


def image_inputs(
    record: EngineRecord,
    images: Sequence[FittedImage],
    vae: VideoCodec,
    image_encoder: ImageEncoder | None = None,
) -> dict[str, np.ndarray]:
    """What `sample` is given for the fitted pictures; nothing where there are none.

    TI2V: first_frame [1, 48, 1, h, w], the first picture's latent. Others: condition
    [1, 20, F, h, w], mask (4) before latent (16), and image [1, 257 or 514, 1280] where the engine
    has that input.
    """
    if not images:
        return {}
    if family_named(record.family).blends_first_frame:
        return {"first_frame": vae.encode(images[0].pixels[:, None])}
    inputs = {"condition": _condition(record.geometry, images, vae)}
    if "image" in record.inputs:
        if image_encoder is None:
            raise BadRequest(
                f"engine {record.name} takes CLIP features: a CLIP image encoder is needed"
            )
        inputs["image"] = image_encoder([image.shown for image in images])
    return inputs


def _condition(
    geometry: Geometry, images: Sequence[FittedImage], vae: VideoCodec
) -> np.ndarray:  # fmt: skip
    """Mask and latent of a video that is the pictures at its ends and zeros between: mid grey.

    The mask's four channels are the pixel frames of a latent frame, the first pixel frame standing
    four times: it is 1 where a picture is given.
    """
    mask = np.zeros((1, TEMPORAL_STRIDE, *geometry.latent), np.float32)
    mask[:, :, 0] = 1
    if len(images) > 1:
        mask[:, -1, -1] = 1
    return np.concatenate([mask, vae.encode(_ends(geometry, images, vae))], axis=1)


def _ends(geometry: Geometry, images: Sequence[FittedImage], vae: VideoCodec) -> Array:
    """The video [3, F, H, W] of the pictures at its ends, where the VAE computes if it says so."""
    shape = (3, geometry.frames, geometry.height, geometry.width)
    pixels: list[Array] = [image.pixels for image in images]
    video = _zeros(shape, getattr(vae, "device", None))
    if is_torch(video):
        import torch

        pixels = [torch.from_numpy(each) for each in pixels]
    video[:, 0] = pixels[0]
    if len(pixels) > 1:
        video[:, -1] = pixels[1]
    return video


def _zeros(shape: tuple[int, ...], device: str | None) -> Array:
    """Zeros on a device of PyTorch's; in numpy without one, or where it has no room for them."""
    if device is not None:
        import torch

        try:
            return torch.zeros(shape, device=device)
        except torch.OutOfMemoryError:
            pass  # the VAE moves it, by tiles if need be
    return np.zeros(shape, np.float32)
