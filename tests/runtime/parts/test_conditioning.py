"""Pictures as image inputs, against the original's formulas and diffusers' own conditioning.

Original: Wan-Video/Wan2.1 `image2video.py`, `first_last_frame2video.py`; Wan-Video/Wan2.2
`textimage2video.py` and `utils/utils.py`, restated here in plain torch, numpy and Pillow.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image

from tests.runtime.drop_in.test_diffusers_pipeline import vae
from tests.runtime.test_denoiser import record
from wanexport.graphs.config import PRESETS
from wanexport.runtime.errors import BadRequest
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.parts import pictures as conditioning
from wanexport.runtime.parts.pictures import FittedImage, fit_image, fit_images, image_inputs

SMALL = Geometry(64, 96, 9)
WIDE_480P, WIDE_720P = Geometry(480, 832, 81), Geometry(720, 1280, 81)
TALL_480P, TI2V = Geometry(832, 480, 81), Geometry(704, 1280, 121, 16)


class DiffusersCodec:
    """diffusers' VAE, normalised as the facts say: (mean of the posterior - mean) / std."""

    def __init__(self, preset: str) -> None:
        self.model = vae(PRESETS[preset].config)

    def encode(self, video: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            mean = self.model.encode(torch.from_numpy(video)[None]).latent_dist.mean.numpy()
        shape = (1, -1, 1, 1, 1)
        means = np.reshape(self.model.config.latents_mean, shape)
        stds = np.reshape(self.model.config.latents_std, shape)
        return np.asarray((mean - means) / stds, np.float32)

    def decode(self, latent: Any) -> np.ndarray:
        raise NotImplementedError


class Clip:
    """Features that tell which images they came from."""

    def __init__(self) -> None:
        self.images: list[np.ndarray] = []

    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        self.images = list(images)
        return np.full((1, 257 * len(images), 1280), 0.5, np.float32)


def noise_picture(height: int, width: int, seed: int = 0) -> Image.Image:
    size = (height, width, 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, size, np.uint8))


def saved(picture: Image.Image, path: Path, **options: Any) -> Path:
    picture.save(path, **options)
    return path


def fitted(seed: int, geometry: Geometry = SMALL) -> FittedImage:
    rng = np.random.default_rng(seed)
    pixels = rng.uniform(-1, 1, (3, geometry.height, geometry.width)).astype(np.float32)
    return FittedImage(pixels, rng.uniform(-1, 1, (3, 30, 40)).astype(np.float32), "")


def to_tensor(picture: Image.Image) -> torch.Tensor:
    """torchvision's to_tensor, then the original's sub_(0.5).div_(0.5)."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).div(255.0).sub(0.5).div(0.5)


def original_mask(geometry: Geometry, known: Sequence[int]) -> np.ndarray:
    """[4, f, h, w] from one value for each pixel frame, the first standing four times."""
    frames, height, width = geometry.latent
    mask = torch.zeros(1, geometry.frames, height, width)
    mask[:, list(known)] = 1
    mask = torch.cat([mask[:, 0:1].repeat_interleave(4, dim=1), mask[:, 1:]], dim=1)
    return mask.view(1, frames, 4, height, width).transpose(1, 2)[0].numpy()


@pytest.mark.parametrize(("preset", "known"), [("i2v-14b", [0]), ("flf2v-14b", [0, -1])])
def test_the_condition_is_the_originals(preset: str, known: list[int]) -> None:
    codec, images = DiffusersCodec(preset), [fitted(seed) for seed in range(len(known))]
    video = torch.zeros(3, SMALL.frames, SMALL.height, SMALL.width)
    for frame, image in zip(known, images):
        video[:, frame] = torch.from_numpy(image.pixels)
    clip = Clip()
    inputs = image_inputs(record(PRESETS[preset].config), images, codec, clip)
    condition = inputs["condition"][0]
    assert condition.dtype == np.float32 and condition.shape == (20, 3, 8, 12)
    np.testing.assert_array_equal(condition[:4], original_mask(SMALL, known))
    np.testing.assert_array_equal(condition[4:], codec.encode(video.numpy())[0])
    assert inputs["image"].shape == (1, 257 * len(known), 1280)
    assert all(a is b.shown for a, b in zip(clip.images, images))


class Pixels:
    """A codec whose latents are pixels: those of each fourth frame, and of the last."""

    def encode(self, video: Any) -> np.ndarray:
        self.video = video
        pixels = np.asarray(video)[:, :, ::8, ::8]
        return np.concatenate([pixels[:, ::4]] * 5 + [pixels[:1, ::-4]])[None]

    def decode(self, latent: Any) -> np.ndarray:
        raise NotImplementedError


class PlacedPixels(Pixels):
    """The same, which says where it computes."""

    device = "cpu"


@pytest.mark.parametrize("preset", ["i2v-14b", "flf2v-14b"])
def test_the_video_is_made_where_a_codec_says_that_it_computes(
    preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [fitted(seed) for seed in range(2 if preset == "flf2v-14b" else 1)]
    given = (record(PRESETS[preset].config), images)
    plain, placed = Pixels(), PlacedPixels()
    expected = image_inputs(*given, plain, Clip())["condition"]
    np.testing.assert_array_equal(image_inputs(*given, placed, Clip())["condition"], expected)
    assert isinstance(placed.video, torch.Tensor)

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "zeros", full)
    np.testing.assert_array_equal(image_inputs(*given, placed, Clip())["condition"], expected)
    assert isinstance(placed.video, np.ndarray)


def test_the_video_never_lies_on_the_host_beside_a_codec_s_device() -> None:
    """The meta device stands for a GPU: it has no values to copy."""
    given: list[torch.Tensor] = []

    class Far:
        device = "meta"

        def encode(self, video: Any) -> np.ndarray:
            given.append(video)
            return np.zeros((1, 16, 3, 8, 12), np.float32)

        def decode(self, latent: Any) -> np.ndarray:
            raise NotImplementedError

    image_inputs(record(PRESETS["i2v-14b"].config), [fitted(0)], Far(), Clip())
    assert given[0].is_meta and given[0].shape == (3, SMALL.frames, SMALL.height, SMALL.width)


@pytest.mark.parametrize("preset", ["i2v-14b", "flf2v-14b", "i2v-a14b"])
def test_the_condition_is_that_of_diffusers(preset: str) -> None:
    codec = DiffusersCodec(preset)
    images = [fitted(seed) for seed in range(2 if preset == "flf2v-14b" else 1)]
    ours = image_inputs(record(PRESETS[preset].config), images, codec, Clip())
    pipeline = WanImageToVideoPipeline(None, None, codec.model, None)
    tensors = [torch.from_numpy(image.pixels)[None] for image in images]
    _, theirs = pipeline.prepare_latents(
        tensors[0], 1, 16, SMALL.height, SMALL.width, SMALL.frames, torch.float32, "cpu",
        last_image=tensors[1] if len(tensors) > 1 else None,
    )  # fmt: skip
    np.testing.assert_allclose(ours["condition"], theirs.detach().numpy(), atol=1e-6)
    assert ("image" in ours) == (preset != "i2v-a14b")


def test_ti2v_is_given_the_latent_of_its_first_frame() -> None:
    codec, image = DiffusersCodec("ti2v-5b"), fitted(0)
    inputs = image_inputs(record(PRESETS["ti2v-5b"].config), [image], codec)
    assert list(inputs) == ["first_frame"] and inputs["first_frame"].shape == (1, 48, 1, 4, 6)
    np.testing.assert_array_equal(inputs["first_frame"], codec.encode(image.pixels[:, None]))


def test_text_alone_needs_no_image_input() -> None:
    codec = DiffusersCodec("ti2v-5b")
    assert image_inputs(record(PRESETS["ti2v-5b"].config), [], codec) == {}
    with pytest.raises(BadRequest, match="a CLIP image encoder is needed"):
        image_inputs(record(PRESETS["i2v-14b"].config), [fitted(0)], DiffusersCodec("i2v-14b"))


def test_a_picture_of_the_engines_aspect_goes_the_official_way(tmp_path: Path) -> None:
    picture = noise_picture(128, 192)
    image = fit_image(saved(picture, tmp_path / "x.png"), SMALL, resample="bicubic")
    whole = to_tensor(picture)
    scaled = torch.nn.functional.interpolate(whole[None], size=(64, 96), mode="bicubic")
    np.testing.assert_array_equal(image.shown, whole.numpy())
    np.testing.assert_allclose(image.pixels, scaled[0].numpy(), atol=1e-6)
    assert image.pixels.dtype == image.shown.dtype == np.float32


@pytest.mark.parametrize(
    ("size", "part"),
    [((64, 200), np.s_[:, :, 52:148]), ((100, 96), np.s_[:, 18:82, :])],
)
def test_what_the_engine_has_no_room_for_is_cut_on_both_sides(
    size: tuple[int, int], part: tuple[slice, ...], tmp_path: Path
) -> None:
    picture = noise_picture(*size)
    image = fit_image(saved(picture, tmp_path / "x.png"), SMALL, resample="bicubic")
    np.testing.assert_array_equal(image.shown, to_tensor(picture)[part].numpy())
    np.testing.assert_allclose(image.pixels, image.shown, atol=1e-6)  # 1:1, bicubic changes nothing


@pytest.mark.parametrize(
    ("size", "geometry"),
    [
        ((480, 832), Geometry(464, 832, 5)),
        ((270, 480), Geometry(464, 832, 5)),
        ((1000, 750), Geometry(1104, 816, 5)),
    ],
)
def test_a_picture_of_the_official_size_is_squeezed_whole_as_the_original_does(
    size: tuple[int, int], geometry: Geometry, tmp_path: Path
) -> None:
    wanted, area = (geometry.height, geometry.width), geometry.height * geometry.width
    assert original_size(*size, 480 * 832 if area < 480 * 832 else 720 * 1280) == wanted
    picture = noise_picture(*size)
    image = fit_image(saved(picture, tmp_path / "x.png"), geometry, resample="bicubic")
    whole = to_tensor(picture)
    scaled = torch.nn.functional.interpolate(whole[None], size=wanted, mode="bicubic")
    np.testing.assert_array_equal(image.shown, whole.numpy())
    np.testing.assert_allclose(image.pixels, scaled[0].numpy(), atol=1e-6)
    assert image.note.endswith(f"(height x width), was scaled to {wanted[0]}x{wanted[1]}")


@pytest.mark.parametrize("size", [(150, 260), (300, 170), (64, 96), (40, 50)])
def test_ti2v_scales_and_cuts_as_the_original(size: tuple[int, int], tmp_path: Path) -> None:
    picture = noise_picture(*size)
    image = fit_image(saved(picture, tmp_path / "x.png"), SMALL, resample="lanczos")
    height, width = size
    scale = max(96 / width, 64 / height)
    scaled = picture.resize((round(width * scale), round(height * scale)), Image.Resampling.LANCZOS)
    x, y = (scaled.width - 96) // 2, (scaled.height - 64) // 2
    np.testing.assert_array_equal(
        image.pixels, to_tensor(scaled.crop((x, y, x + 96, y + 64))).numpy()
    )


@pytest.mark.parametrize("resample", ["bicubic", "lanczos"])
@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (3000, 2)])
def test_the_thinnest_picture_fills_the_video(
    size: tuple[int, int], resample: str, tmp_path: Path
) -> None:
    path = saved(Image.new("RGB", size[::-1], (255, 0, 0)), tmp_path / "x.png")
    image = fit_image(path, SMALL, resample=resample)
    np.testing.assert_allclose(image.pixels[0], np.ones((64, 96)), atol=1e-5)
    np.testing.assert_allclose(image.pixels[1:], -np.ones((2, 64, 96)), atol=1e-5)


# What the original computes for these was run with its own formulas, by hand: wan_i2v floors the
# root of 480 * 480, which is a hair under it.
@pytest.mark.parametrize(
    ("size", "geometry", "resample", "said"),
    [
        ((1080, 1920), WIDE_480P, "bicubic", "cut to its middle 1080x1872, scaled to 480x832 and "
         "would have made the official code choose 464x832"),
        ((480, 832), WIDE_480P, "bicubic", "would have made the official code choose "
         "464x832"),
        ((960, 1664), WIDE_480P, "bicubic", "was scaled to 480x832 and would have made the "
         "official code choose 464x832"),
        ((832, 480), TALL_480P, "bicubic", None),
        ((720, 1280), WIDE_720P, "bicubic", None),
        ((1440, 2560), WIDE_720P, "bicubic", "was scaled to 720x1280"),
        ((1000, 1000), Geometry(464, 832, 81), "bicubic", "cut to its middle 558x1000, scaled to "
         "464x832 and would have made the official code choose 624x624"),
        ((1080, 1920), Geometry(704, 1248, 121, 16), "lanczos", "was cut to its middle 1080x1915 "
         "and scaled to 704x1248"),
        ((1080, 1920), TI2V, "lanczos", "cut to its middle 1056x1920, scaled to 704x1280 and would "
         "have made the official code choose 704x1248"),
        ((704, 1280), TI2V, "lanczos", None),
    ],
)  # fmt: skip
def test_the_user_is_told_what_became_of_the_picture(
    size: tuple[int, int], geometry: Geometry, resample: str, said: str | None, tmp_path: Path
) -> None:
    path = saved(Image.new("RGB", size[::-1]), tmp_path / "cat.png")
    note = fit_image(path, geometry, resample=resample).note
    if said is None:
        assert note == ""
    else:
        assert note.startswith(f"cat.png, {size[0]}x{size[1]} pixels (height x width), ")
        assert note.endswith(said)
    if said and "scaled" in said:
        assert "official" not in fit_image(path, geometry, resample=resample, tells_size=False).note


def original_size(height: int, width: int, area: int) -> tuple[int, int]:
    """WanI2V's size for a picture, in pixels."""
    aspect = height / width
    rows = round(np.sqrt(area * aspect) // 8 // 2 * 2)
    columns = round(np.sqrt(area / aspect) // 8 // 2 * 2)
    return rows * 8, columns * 8


def original_best_size(w: int, h: int, side: int, area: int) -> tuple[int, int]:
    """WanTI2V's: the better of the sizes from a floored width and from a floored height."""
    ratio = w / h
    wide = (area * ratio) ** 0.5
    high = area / wide
    first_w = int(wide // side * side)
    first_h = int(area / first_w // side * side)
    second_h = int(high // side * side)
    second_w = int(area / second_h // side * side)
    strains = [max(ratio / r, r / ratio) for r in (first_w / first_h, second_w / second_h)]
    return (first_h, first_w) if strains[0] < strains[1] else (second_h, second_w)


def test_the_official_sizes_for_many_pictures(rng: np.random.Generator) -> None:
    for height, width in rng.integers(300, 3000, (500, 2)).tolist():
        for geometry in (WIDE_480P, TALL_480P, WIDE_720P):
            area = geometry.height * geometry.width
            assert conditioning._official_size(
                (height, width), geometry, "bicubic"
            ) == original_size(height, width, area)
        assert conditioning._official_size((height, width), TI2V, "lanczos") == original_best_size(
            width, height, 32, 704 * 1280
        )


RED, GREY = (255, 0, 0), (51, 51, 51)


def cmyk(path: Path) -> Path:
    return saved(Image.new("CMYK", (96, 64), (0, 255, 255, 0)), path.with_suffix(".tif"))


def palette(path: Path) -> Path:
    return saved(Image.new("RGB", (96, 64), RED).quantize(4), path)


def alpha(path: Path) -> Path:
    return saved(Image.new("RGBA", (96, 64), (*RED, 40)), path)


def grey(path: Path) -> Path:
    return saved(Image.new("L", (96, 64), 51), path)


def grey_alpha(path: Path) -> Path:
    return saved(Image.new("LA", (96, 64), (51, 9)), path)


def grey_16_bit(path: Path) -> Path:
    return saved(Image.fromarray(np.full((64, 96), 51 * 257, np.uint16)), path)


def animated(path: Path) -> Path:
    frames = [Image.new("RGB", (96, 64), colour) for colour in (RED, GREY)]
    return saved(frames[0], path.with_suffix(".gif"), save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    ("make", "colour"),
    [(cmyk, RED), (palette, RED), (alpha, RED), (animated, RED), (grey, GREY), (grey_alpha, GREY),
     (grey_16_bit, GREY)],
)  # fmt: skip
def test_every_kind_of_picture_becomes_rgb(
    make: Any, colour: tuple[int, int, int], tmp_path: Path
) -> None:
    pixels = fit_image(make(tmp_path / "x.png"), SMALL, resample="lanczos").pixels
    expected = np.array(colour).reshape(3, 1, 1) / 127.5 - 1
    np.testing.assert_allclose(pixels, np.broadcast_to(expected, pixels.shape), atol=1e-6)


def test_a_picture_taken_sideways_is_turned_upright(tmp_path: Path) -> None:
    upright = noise_picture(64, 96)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera's top is at the right
    sideways = upright.transpose(Image.Transpose.ROTATE_90)
    image = fit_image(saved(sideways, tmp_path / "x.png", exif=exif), SMALL, resample="bicubic")
    np.testing.assert_array_equal(image.shown, to_tensor(upright).numpy())


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def too_large(path: Path) -> Path:
    """13000x13000 pixels in some kilobytes: one bit for each, all of them white."""
    return saved(Image.new("1", (13_000, 13_000), 1), path)


def no_file(path: Path) -> Path:
    return path


def text_file(path: Path) -> Path:
    path.write_text("no picture")
    return path


def cut_short(path: Path) -> Path:
    saved(noise_picture(64, 96), path.with_suffix(".jpg"))
    content = path.with_suffix(".jpg").read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


def floats(path: Path) -> Path:
    return saved(Image.fromarray(np.ones((64, 96), np.float32)), path.with_suffix(".tif"))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("make", "reason"),
    [(no_file, "No such file"), (text_file, "it is none"), (cut_short, "truncated"),
     (floats, "no fixed white"), (pipe, "no regular file"),
     (too_large, "it has 13000x13000 pixels, expected at most 89478485: scale it first"),
     (lambda path: path.parent, "Is a directory")],
)  # fmt: skip
def test_what_is_no_picture_is_refused_in_one_line(make: Any, reason: str, tmp_path: Path) -> None:
    path = make(tmp_path / "x.png")
    with pytest.raises(BadRequest) as refusal:
        fit_image(path, SMALL, resample="bicubic")
    message = str(refusal.value)
    assert reason in message and str(path) in message and "\n" not in message


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("times", [1.5, 3])
def test_a_picture_that_would_fill_the_memory(
    times: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(noise_picture(64, 96), tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(64 * 96 / times))
    with pytest.raises(BadRequest, match="exceeds limit"):
        fit_image(path, SMALL, resample="bicubic")


@pytest.mark.parametrize(
    ("preset", "image", "last", "said"),
    [
        ("tiny", True, False, "is text-to-video and takes no image: leave out the image"),
        ("i2v-14b", False, False, r"give it a first image \(--image\)"),
        ("i2v-14b", True, True, "takes no last image: leave out the last image"),
        ("ti2v-5b", True, True, "takes no last image"),
        ("tiny", False, True, "takes no last image"),
        ("flf2v-14b", True, False, r"give it that too \(--last-image\)"),
        ("flf2v-14b", False, True, r"give it a first image \(--image\)"),
    ],
)
def test_images_that_the_model_does_not_take_or_lacks(
    preset: str, image: bool, last: bool, said: str, tmp_path: Path
) -> None:
    path = saved(noise_picture(64, 96), tmp_path / "x.png")
    with pytest.raises(BadRequest, match=said):
        fit_images(record(PRESETS[preset].config), path if image else None, path if last else None)


def test_one_frame_is_not_enough_for_images(tmp_path: Path) -> None:
    path = saved(noise_picture(64, 96), tmp_path / "x.png")
    singles = {
        preset: replace(engine, geometry=replace(engine.geometry, frames=1))
        for preset in ("ti2v-5b", "flf2v-14b")
        for engine in [record(PRESETS[preset].config)]
    }
    with pytest.raises(BadRequest, match="makes a single frame"):
        fit_images(singles["ti2v-5b"], path)
    with pytest.raises(BadRequest, match="build one of 5 frames"):
        fit_images(singles["flf2v-14b"], path, path)


@pytest.mark.parametrize("preset", ["i2v-14b", "flf2v-14b", "i2v-a14b", "ti2v-5b"])
def test_each_family_scales_its_own_way(preset: str, tmp_path: Path) -> None:
    paths = [saved(noise_picture(100, 150, seed), tmp_path / f"{seed}.png") for seed in (0, 1)]
    paths = paths if preset == "flf2v-14b" else paths[:1]
    engine = record(PRESETS[preset].config)
    resample = "lanczos" if preset == "ti2v-5b" else "bicubic"
    images = fit_images(engine, *paths)
    assert len(images) == len(paths)
    for image, path in zip(images, paths):
        expected = fit_image(path, engine.geometry, resample=resample)
        np.testing.assert_array_equal(image.pixels, expected.pixels)
    assert fit_images(record(PRESETS["ti2v-5b"].config), None) == []
