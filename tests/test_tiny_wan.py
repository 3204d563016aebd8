"""The tiny trained Wan: its files, what its clips show from each backend, and its small parts."""

import csv
import io
import json
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from samples.tiny_wan.clips import BACKGROUND, CAPTIONS, draw, meaning
from samples.tiny_wan.codec import TIME, Decoder, PixelCodec, to_blocks, to_uint8
from samples.tiny_wan.contact_sheet import contact_sheet
from samples.tiny_wan.loss_plot import loss_plot
from samples.tiny_wan.words import VOCABULARY, WordEmbeddings
from tests.oracles.clip_reading import centroid, foreground, moments, read, share_read_right
from tests.quick import slow_but
from tests.tables.tiny_wan import (
    CLIPS,
    COMPILED,
    MODEL,
    SHAPE,
    Judgement,
    judge,
    open_backends,
    psnr_of,
    read_right,
    sample_clips,
)
from wanexport.exporter.build import build
from wanexport.runtime import load
from wanexport.runtime.bundle.tensorfile import load_arrays
from wanexport.runtime.errors import WanExportError

CHECKPOINT = MODEL / "diffusion_pytorch_model.safetensors"
CODEC = MODEL / "codec.safetensors"
FEW = 8  # clips


def drawn(count: int, seed: int = 0) -> tuple[torch.Tensor, list[str]]:
    """Clips [count, 3, F, H, W] and their captions, every caption in turn."""
    indices = torch.arange(count) % len(CAPTIONS)
    clips = draw(indices, torch.Generator().manual_seed(seed))
    return clips, [CAPTIONS[index] for index in indices]


@pytest.fixture(scope="module", params=slow_but([FEW, CLIPS], FEW))
def judgement(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Judgement:
    """Clips from each backend from the same noise: many of all, of each caption; or a few."""
    folder, count = tmp_path_factory.mktemp("tiny_wan"), request.param
    backends = open_backends(folder / "bundle", COMPILED if count == CLIPS else ("onnx",))
    return judge({name: sample_clips(one, count) for name, one in backends.items()})


def test_the_clips_of_each_backend_show_their_captions(judgement: Judgement) -> None:
    counts = {len(readings) for readings in judgement.readings.values()}
    assert counts in ({FEW}, {CLIPS}) and len(CAPTIONS) <= CLIPS
    for readings in judgement.readings.values():
        assert np.mean(read_right(readings)) >= 0.95


def test_the_same_clips_read_alike_from_every_backend(judgement: Judgement) -> None:
    """But for one that stands on the edge of two readings, perhaps."""
    different = [len(set(readings)) > 1 for readings in zip(*judgement.readings.values())]
    assert sum(different) <= 1


def test_no_one_can_tell_the_backends_clips_apart(judgement: Judgement) -> None:
    """Rounding a picture to 8 bits costs 59 dB; rounding errors of fp32 alone leave far more.

    The least is lower than most: where noise lies between two clips, small errors grow.
    """
    names = [*judgement.readings]
    assert [*judgement.psnr] == [*combinations(names, 2)] and names[:2] == ["eager", "onnx"]
    for psnr in judgement.psnr.values():
        assert len(psnr) == len(judgement.readings["eager"])
        assert psnr.min() > 60
        assert np.median(psnr) > 100


@pytest.mark.gpu
def test_the_clips_of_the_default_engine_of_a_gpu_show_their_captions(tmp_path: Path) -> None:
    build(MODEL, **SHAPE, output=tmp_path)
    denoiser = load(tmp_path)
    record = denoiser.record
    assert (record.backend, record.dtype, record.target["device"]) == ("aoti", "bf16", "cuda")
    (readings,) = judge({"aoti": sample_clips(denoiser, 48)}).readings.values()
    assert np.mean(read_right(readings)) >= 0.95


def test_the_checkpoint_has_the_recorded_config_and_is_finite() -> None:
    config = json.loads((MODEL / "config.json").read_text())
    arrays = load_arrays(CHECKPOINT)
    dim, ffn_dim = config["dim"], config["ffn_dim"]
    assert dim == 128 * config["num_heads"]
    assert arrays["patch_embedding.weight"].shape == (dim, config["in_dim"], 1, 2, 2)
    assert arrays["head.head.weight"].shape == (4 * config["out_dim"], dim)
    assert arrays["time_embedding.0.weight"].shape == (dim, config["freq_dim"])
    layers = {name.split(".")[1] for name in arrays if name.startswith("blocks.")}
    assert layers == {str(layer) for layer in range(config["num_layers"])}
    for layer in layers:
        assert arrays[f"blocks.{layer}.ffn.0.weight"].shape == (ffn_dim, dim)
    for array in (*arrays.values(), *load_arrays(CODEC).values()):
        assert array.dtype == np.float16 and np.isfinite(array).all()


def test_the_models_files_are_small() -> None:
    assert CHECKPOINT.stat().st_size + CODEC.stat().st_size <= 12e6
    assert (MODEL / "contact_sheet.png").stat().st_size < 150e3


def test_the_record_says_what_was_run() -> None:
    record = json.loads((MODEL / "training.json").read_text())
    with (MODEL / "loss.csv").open(newline="") as file:
        curve = [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]
    steps = record["settings"]["steps"]
    assert [step for step, _ in curve] == list(range(50, steps + 1, 50))
    assert record["loss"] == pytest.approx(np.mean([loss for _, loss in curve[-10:]]), abs=1e-5)
    assert curve[0][1] > 1 > 0.1 > record["loss"]  # untrained, the velocity's variance is over 1
    # The steps follow from the time of the first of them.
    assert record["codec_seconds"] < record["seconds"] < 66 * record["settings"]["minutes"]
    assert {"seed", "batch", "learning_rate"} <= record["settings"].keys()
    assert {"torch", "diffusers", "numpy", "python"} <= record["versions"].keys()


@pytest.mark.parametrize("count", slow_but([48, 200], 48))
def test_the_codec_keeps_new_clips(count: int) -> None:
    """As it was recorded over other clips, and such that all of them are still read."""
    clips, captions = drawn(count, seed=1)
    codec = PixelCodec(CODEC)
    decoded = np.stack([codec.decode(codec.encode(clip.numpy())) for clip in clips])
    drawings = to_uint8(clips).numpy()
    errors = [np.square(a.astype(float) - b).mean() for a, b in zip(decoded, drawings)]
    psnr = 10 * np.log10(255**2 / np.mean(errors))
    assert psnr > 35
    recorded = json.loads((MODEL / "training.json").read_text())["codec_psnr"]
    assert psnr == pytest.approx(recorded, abs=0.5)
    assert share_read_right(list(decoded), captions) >= 0.98


def test_psnr_is_of_each_pair_of_videos() -> None:
    """A hundredth of the range of [-1, 1] everywhere is 40 dB, a tenth of it 20 dB."""
    video = torch.zeros(2, 3, 5, 16, 16)
    other = video + torch.tensor([0.02, 0.2]).view(2, 1, 1, 1, 1)
    assert psnr_of(video, other).tolist() == pytest.approx([40, 20])


def test_a_contact_sheet_shows_four_frames_of_each_clip_between_lines() -> None:
    colours = np.arange(5 * 7, dtype=np.uint8).reshape(5, 7) * 7  # of each clip and frame
    videos = [np.broadcast_to(clip[:, None, None, None], (7, 8, 10, 3)) for clip in colours]
    sheet = np.asarray(Image.open(io.BytesIO(contact_sheet(videos, [""] * 5))).convert("RGB"))
    assert sheet.shape == (2 * (16 + 8 + 4), 4 * (4 * 10 + 3 + 4), 3)
    for number, clip in enumerate(colours):
        top, left = 28 * (number // 4) + 16, 47 * (number % 4)
        row = sheet[top + 4, left : left + 47, 0]
        for place, frame in enumerate([0, 2, 4, 6]):
            assert (row[11 * place : 11 * place + 10] == clip[frame]).all()
            assert row[11 * place + 10] == 255


def test_the_loss_curve_falls_in_its_picture() -> None:
    """The line's pixels, which alone are blue, go from the upper left to the lower right."""
    png = loss_plot([(50, 1.0), (100, 0.5), (150, 0.1)])
    picture = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    y, x = np.nonzero(picture[..., 2] - picture[..., 0] > 80)
    assert y[x.argmin()] < y[x.argmax()] - 100


@pytest.mark.parametrize("count", slow_but([48, 200], 48))
def test_the_classifier_reads_drawn_clips(count: int) -> None:
    clips, captions = drawn(count)
    assert share_read_right(list(to_uint8(clips).numpy()), captions) >= 0.99


def test_the_classifier_tells_every_part_of_a_caption() -> None:
    """A clip judged by another caption is wrong, whichever word differs."""
    clips, captions = drawn(len(CAPTIONS))
    readings = [read(video) for video in to_uint8(clips).numpy()]
    assert readings == [meaning(caption) for caption in captions]
    assert len(set(readings)) == 3 * 4 * 4


def test_a_clip_that_shows_nothing_is_not_read() -> None:
    rng = np.random.default_rng(0)
    ground = np.array(BACKGROUND) * 255
    assert read((ground + rng.normal(0, 2, (17, 96, 96, 3))).clip(0, 255).astype(np.uint8)) is None


@pytest.mark.parametrize(
    ("shape", "expected"),
    [("circle", (0, 2 / 3)), ("square", (0, 1)), ("triangle", (-0.566, None))],
)
def test_the_moments_of_drawn_shapes_are_the_analytic_ones(
    shape: str, expected: tuple[float, float | None]
) -> None:
    clips, captions = drawn(len(CAPTIONS))
    for clip, caption in zip(to_uint8(clips).numpy(), captions):
        if meaning(caption)[0] == shape:
            skewness, together = moments(foreground(clip)[0])
            assert skewness == pytest.approx(expected[0], abs=0.06)
            assert expected[1] is None or together == pytest.approx(expected[1], abs=0.04)


def test_a_shape_stays_in_the_picture_and_moves_straight() -> None:
    clips, captions = drawn(96)
    ground = torch.tensor(BACKGROUND).view(1, 3, 1, 1) * 2 - 1
    for edge in (clips[..., 0, :], clips[..., -1, :], clips[..., :, 0], clips[..., :, -1]):
        torch.testing.assert_close(edge, ground.expand_as(edge))
    for video, caption in zip(to_uint8(clips).numpy(), captions):
        path = np.array([centroid(frame) for frame in foreground(video)])
        along = 0 if meaning(caption)[2] in ("left", "right") else 1
        assert 24 < abs(path[-1] - path[0])[along] < 42
        assert np.ptp(path[:, 1 - along]) < 0.5


def test_the_clips_follow_from_the_seed() -> None:
    torch.testing.assert_close(drawn(8)[0], drawn(8)[0], rtol=0, atol=0)
    assert not torch.equal(drawn(8)[0], drawn(8, seed=1)[0])


def test_blocks_hold_the_first_frame_alone_and_then_four_frames() -> None:
    video = torch.arange(2 * 3 * 5 * 16 * 24).view(2, 3, 5, 16, 24).float()
    blocks = to_blocks(video)
    assert blocks.shape == (2, 2, 2, 3, 3 * TIME * 8 * 8)
    one = blocks.view(2, 2, 2, 3, 3, TIME, 8, 8)
    for time, (row, column) in product(range(TIME), [(0, 0), (1, 2)]):
        place = (slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8))
        assert torch.equal(one[1, 0, row, column, :, time], video[1, :, 0, *place])
        assert torch.equal(one[1, 1, row, column, :, time], video[1, :, 1 + time, *place])


def test_the_decoder_has_the_strides_of_wans_vae() -> None:
    assert Decoder()(torch.zeros(1, 16, 5, 2, 3)).shape == (1, 3, 17, 16, 24)


def test_word_embeddings_are_rows_in_word_order() -> None:
    (text, other) = WordEmbeddings()(["a red circle moves left", "Left moves"])
    assert text.shape == (5, 4096) and text.dtype == np.float32
    np.testing.assert_array_equal(other, text[[4, 3]])
    signs = np.random.Generator(np.random.PCG64(0)).integers(0, 2, (len(VOCABULARY), 4096))
    np.testing.assert_array_equal(text[0], np.where(signs[0] == 1, 1, -1))


@pytest.mark.parametrize("prompt", ["a purple circle moves left", "", "a " * 513])
def test_a_prompt_that_the_model_cannot_read_is_one_line(prompt: str) -> None:
    with pytest.raises(WanExportError, match=f"of the words {', '.join(VOCABULARY)}") as raised:
        WordEmbeddings()([prompt])
    assert "\n" not in str(raised.value)


def test_the_unknown_word_is_named() -> None:
    with pytest.raises(WanExportError, match="'purple'"):
        WordEmbeddings()(["a purple circle moves left"])
