"""The forms of one picture: a file, its bytes, a PIL image, an array, a tensor. One to the bit."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from tests.runtime.test_denoiser import record
from wanexport.graphs.config import PRESETS
from wanexport.runtime.errors import BadRequest
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.parts.picture_reading import own_picture, read_picture
from wanexport.runtime.parts.pictures import fit_image, fit_images

SMALL = Geometry(64, 96, 9)
PIXELS = np.random.default_rng(0).integers(0, 256, (100, 150, 3), np.uint8)
ALL_VALUES = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)


def picture_file(folder: Path) -> Path:
    path = folder / "cat.png"
    Image.fromarray(PIXELS).save(path)
    return path


# Each makes its form of the pixels from their file; / 255 is what torchvision's ToTensor does.
FORMS: dict[str, Callable[[Path], Any]] = {
    "path": lambda path: path,
    "str": str,
    "bytes": Path.read_bytes,
    "PIL, opened": Image.open,
    "PIL, in memory": lambda path: Image.fromarray(PIXELS),
    "array": lambda path: PIXELS,
    "array, strided": lambda path: np.ascontiguousarray(PIXELS[::-1, :, ::-1])[::-1, :, ::-1],
    "array, fp64": lambda path: PIXELS / 255,
    "array, fp32": lambda path: PIXELS.astype(np.float32) / np.float32(255),
    "tensor": lambda path: torch.from_numpy(PIXELS),
    "tensor, permuted": lambda path: torch.from_numpy(PIXELS.transpose(2, 0, 1).copy()).permute(
        1, 2, 0
    ),
    "tensor, fp32": lambda path: torch.from_numpy(PIXELS).div(255),
    "tensor, with autograd": lambda path: torch.from_numpy(PIXELS).div(255).requires_grad_(),
}


@pytest.mark.parametrize("resample", ["bicubic", "lanczos"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_picture_gives_the_same_bits(
    form: str, resample: str, tmp_path: Path
) -> None:
    path = picture_file(tmp_path)
    from_file = fit_image(path, SMALL, resample=resample)
    fitted = fit_image(FORMS[form](path), SMALL, resample=resample)
    assert fitted.pixels.tobytes() == from_file.pixels.tobytes()
    assert fitted.shown.tobytes() == from_file.shown.tobytes()
    name = "cat.png" if form in ("path", "str") else "image"
    assert fitted.note == f"{name}, {from_file.note.partition(', ')[2]}" != ""


def test_the_file_gives_the_pixels_that_were_put_into_it(tmp_path: Path) -> None:
    """What all forms equal is right: the picture is neither turned nor its colours swapped."""
    rgb = np.asarray(read_picture(picture_file(tmp_path), "image"))
    np.testing.assert_array_equal(rgb, PIXELS)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_floats_are_the_nearest_of_256_values(dtype: str) -> None:
    tensor = torch.from_numpy(ALL_VALUES).to(torch.float64).div(255).to(getattr(torch, dtype))
    np.testing.assert_array_equal(np.asarray(read_picture(tensor, "image")), ALL_VALUES)
    if dtype != "bfloat16":  # which numpy lacks
        np.testing.assert_array_equal(np.asarray(read_picture(tensor.numpy(), "image")), ALL_VALUES)


MODES: dict[str, Callable[[], Image.Image]] = {
    "RGBA": lambda: Image.new("RGBA", (96, 64), (255, 0, 0, 40)),
    "LA": lambda: Image.new("LA", (96, 64), (51, 9)),
    "L": lambda: Image.fromarray(PIXELS[..., 0]),
    "P": lambda: Image.fromarray(PIXELS).quantize(16),
    "1": lambda: Image.fromarray(PIXELS).convert("1"),
    "I;16": lambda: Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257),
}


@pytest.mark.parametrize("mode", MODES)
def test_an_image_of_another_mode_is_read_as_its_file_is(mode: str, tmp_path: Path) -> None:
    picture = MODES[mode]()
    assert picture.mode == mode
    picture.save(tmp_path / "x.png")
    from_file = np.asarray(read_picture(tmp_path / "x.png", "image"))
    np.testing.assert_array_equal(np.asarray(read_picture(picture, "image")), from_file)
    np.testing.assert_array_equal(own_picture(picture, "image"), from_file)


@pytest.mark.parametrize("kind", ["png", "jpg", "tif"])
@pytest.mark.parametrize("form", ["file", "bytes", "opened", "kept"])
def test_what_was_taken_sideways_is_upright_in_every_form(
    kind: str, form: str, tmp_path: Path
) -> None:
    upright = Image.linear_gradient("L").resize((96, 64)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera's top is at the right
    path = tmp_path / f"x.{kind}"
    upright.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif, quality=100)
    given: Any = {"file": path, "bytes": path.read_bytes()}.get(form) or Image.open(path)
    if form == "kept":
        given = own_picture(given, "image")
    read = np.asarray(read_picture(given, "image"))
    assert np.abs(read.astype(int) - np.asarray(upright)).max() <= 2  # JPEG


def test_pixels_are_taken_and_files_are_left(tmp_path: Path) -> None:
    path, content = picture_file(tmp_path), picture_file(tmp_path).read_bytes()
    assert own_picture(path, "image") is path and own_picture(str(path), "image") == str(path)
    assert own_picture(content, "image") is content and own_picture(None, "image") is None
    mine, tensor, picture = PIXELS.copy(), torch.from_numpy(PIXELS.copy()), Image.fromarray(PIXELS)
    with Image.open(path) as opened:
        kept = [own_picture(p, "image") for p in (mine, tensor, picture, opened)]
    mine[:] = 0
    picture.paste((0, 0, 0), (0, 0, 150, 100))
    tensor.zero_()
    for own in kept:
        np.testing.assert_array_equal(own, PIXELS)


def closed(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture


def cut_short(path: Path) -> Image.Image:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return Image.open(path)


NOT_PICTURES: list[tuple[Any, str]] = [
    ([[0.0]], "image is of type list: expected a path, the bytes of a PNG"),
    (7, "image is of type int: expected a path"),
    (bytearray(9), "image is of type bytearray: expected"),
    (b"no picture", "cannot read image, 10 bytes, as an image (it is none)"),
    (b"", "cannot read image, 0 bytes, as an image (it is none)"),
    (np.zeros((3, 64, 96), np.uint8), "image has shape [3, 64, 96]: expected [H, W, 3]"),
    (torch.zeros(1, 64, 96, 3), "image has shape [1, 64, 96, 3]: expected [H, W, 3]"),
    (np.zeros((64, 96, 4), np.uint8), "image has shape [64, 96, 4]: expected [H, W, 3]"),
    (np.zeros((64, 96), np.uint8), "image has shape [64, 96]: expected [H, W, 3]"),
    (np.zeros((0, 96, 3), np.uint8), "image has shape [0, 96, 3]: expected [H, W, 3]"),
    (PIXELS.astype(np.int64), "image is int64: expected uint8"),
    (torch.zeros(64, 96, 3, dtype=torch.bool), "image is bool: expected uint8"),
    (np.zeros((64, 96, 3), complex), "image is complex128: expected uint8"),
    (PIXELS.astype(np.float32), "image has values from 0 to 255: expected from 0 to 1"),
    (torch.full((64, 96, 3), -1.0), "image has values from -1 to -1: expected from 0 to 1"),
    (np.full((64, 96, 3), np.nan), "image has values from nan to nan: expected from 0 to 1"),
    (np.broadcast_to(np.uint8(0), (13_000, 13_000, 3)), "it has 13000x13000 pixels, expected at"),
    (Image.new("RGB", (0, 5)), "it has 5x0 pixels"),
    (Image.fromarray(np.ones((64, 96), np.float32)), "image in mode F, as an image (its pixels"),
    (closed, "a PIL image in mode RGB, as an image ("),
    (cut_short, "a PIL image in mode RGB, as an image ("),
]


@pytest.mark.parametrize(("given", "said"), NOT_PICTURES)
def test_what_is_no_picture_is_one_line_that_names_what_was_found(
    given: Any, said: str, tmp_path: Path
) -> None:
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    given = given(picture_file(tmp_path)) if callable(given) else given
    with pytest.raises(BadRequest, match=re.escape(said)) as error:
        fit_image(given, SMALL, resample="bicubic")
    assert "\n" not in str(error.value)
    if not isinstance(given, bytes):
        with pytest.raises(BadRequest, match=re.escape(said)):
            own_picture(given, "image")


def test_an_image_that_fails_is_refused_at_every_try(tmp_path: Path) -> None:
    """Pillow may give what it had read of a broken file at a second attempt."""
    picture = cut_short(picture_file(tmp_path))
    for _ in range(2):
        with pytest.raises(BadRequest):
            read_picture(picture, "image")


def test_a_first_and_a_last_image_are_told_apart() -> None:
    engine = record(PRESETS["flf2v-14b"].config)
    notes = [image.note for image in fit_images(engine, PIXELS, PIXELS[::-1])]
    assert notes[0].startswith("image, 100x150") and notes[1].startswith("last_image, 100x150")
    with pytest.raises(BadRequest, match=r"^last_image is of type int"):
        fit_images(engine, PIXELS, 7)  # type: ignore[arg-type]
