"""`wanexport run` from a prompt to a video, against diffusers' models run by hand.

The models are small, the classes real. The oracle's loop is Euler's, x += (sigma' - sigma) * v.
"""

import hashlib
import json
import shlex
import shutil
import sys
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from tests.oracles import official_encoders, official_vae
from tests.oracles.official_encoders import write_tokenizer
from tests.oracles.transformers_encoders import clip_of, umt5_of
from tests.oracles.wan_reference import diffusers_velocity
from tests.quick import slow_but
from tests.runtime.drop_in.test_diffusers_pipeline import Family, make_family, picture
from wanexport.exporter.bundle.writer import write_manifest
from wanexport.exporter.cli.main import cli
from wanexport.exporter.run import run as generate
from wanexport.exporter.run.request import RunRequest, sidecar
from wanexport.runtime.bundle.manifest import read_manifest
from wanexport.runtime.bundle.tensorfile import load_arrays, save_arrays
from wanexport.runtime.denoiser import Session
from wanexport.runtime.errors import WanExportError
from wanexport.runtime.family import FAMILIES, family_of
from wanexport.runtime.parts.text_encoder import UMT5TextEncoder
from wanexport.runtime.parts.vae import Vae, open_vae
from wanexport.runtime.serving import video as video_module
from wanexport.runtime.settings import Settings

T5 = "models_t5_umt5-xxl-enc-bf16.pth"
CLIP = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
TEXT_SIZES = {**official_encoders.TEXT_SIZES, "dim": 4096}
IMAGE_SIZES = {**official_encoders.IMAGE_SIZES, "dim": 1280, "ffn": 16, "layers": 2, "image": 224}
PROMPT, NEGATIVE = "a red circle moves left", "blurred &amp; still"
SIGMAS, GUIDANCE = (1.0, 0.6, 0.3, 0.0), 3.0
SAMPLING = ("--timesteps", "1000,600,300", "--guidance", GUIDANCE)
NAMED = "taking the text encoder and the VAE from {}, which the bundle names; "
NAMED += "-m names another checkpoint"


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def run(*arguments: object) -> dict[str, Any]:
    """The record that the command prints; an output that is there is replaced."""
    result = invoke("run", *arguments, "--overwrite", "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    record: dict[str, Any] = json.loads(result.stdout)
    return record


def refusal_of(*arguments: object) -> str:
    """The one line with which the command refuses."""
    result = invoke("run", *arguments)
    assert isinstance(result.exception, WanExportError), (result.output, result.exception)
    message = str(result.exception)
    assert "\n" not in message
    return message


@cache
def text_encoder() -> UMT5EncoderModel:
    torch.manual_seed(1)
    config = UMT5Config(
        vocab_size=64, d_model=4096, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
        attn_implementation="eager",
    )  # fmt: skip
    return UMT5EncoderModel(config).to(torch.bfloat16).eval()


@cache
def vae(channels: int) -> AutoencoderKLWan:
    """A VAE of the official kinds but for its width, with the official mean and deviation."""
    torch.manual_seed(2)
    small: dict[str, Any] = {"base_dim": 4, "z_dim": channels}
    if channels == 48:
        small |= {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12}
        small |= {"scale_factor_spatial": 16, "latents_mean": [0.1] * 48, "latents_std": [0.8] * 48}
    return AutoencoderKLWan(**small).eval().requires_grad_(False)


@cache
def image_encoder() -> CLIPVisionModel:
    torch.manual_seed(3)
    config = CLIPVisionConfig(
        hidden_size=1280, intermediate_size=16, num_hidden_layers=2, num_attention_heads=16,
        image_size=224, patch_size=14, hidden_act="gelu",
    )  # fmt: skip
    return CLIPVisionModel(config).eval().requires_grad_(False)


def whole_family(preset: str, folder: Path) -> Family:
    """A checkpoint in diffusers' layout with all its parts, and the bundle that came from it."""
    family = make_family(preset, folder)
    model = folder / "model"
    text_encoder().save_pretrained(model / "text_encoder")
    write_tokenizer(model / "tokenizer")
    vae(family.config.out_channels).save_pretrained(model / "vae")
    if family.config.image_tokens:
        image_encoder().save_pretrained(model / "image_encoder")
    return family


@pytest.fixture(scope="module")
def t2v(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return whole_family("t2v-1.3b", tmp_path_factory.mktemp("t2v"))


@pytest.fixture(scope="module")
def i2v(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return whole_family("i2v-14b", tmp_path_factory.mktemp("i2v"))


@pytest.fixture(scope="module")
def ti2v(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return whole_family("ti2v-5b", tmp_path_factory.mktemp("ti2v"))


def embedding(family: Family, prompt: str) -> np.ndarray:
    """[1, 512, 4096], zeros after the tokens, as the DiT pads it."""
    tokenizer = Tokenizer.from_file(str(family.bundle.parent / "model/tokenizer/tokenizer.json"))
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    with torch.no_grad():
        rows = text_encoder()(ids).last_hidden_state.float().numpy()
    return np.pad(rows, ((0, 0), (0, 512 - rows.shape[1]), (0, 0)))


def pixels_of(image: Path) -> Tensor:
    """[1, 3, H, W] from -1 to 1."""
    array = np.array(Image.open(image).convert("RGB"), np.float32)
    return torch.from_numpy(array).permute(2, 0, 1)[None] / 127.5 - 1


def features(images: list[Tensor]) -> np.ndarray:
    """CLIP's, of the last block but one, of images squeezed to 224x224."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
    small = [torch.nn.functional.interpolate(x, (224, 224), mode="bicubic") for x in images]
    prepared = torch.cat([(x / 2 + 0.5 - mean) / std for x in small])
    states = image_encoder()(prepared, output_hidden_states=True).hidden_states
    return states[-2].numpy().reshape(1, -1, 1280)


def image_inputs(family: Family, images: list[Path]) -> dict[str, np.ndarray]:
    """condition and image by diffusers and by hand, for pictures of the video's own size."""
    pixels, geometry = [pixels_of(image) for image in images], family.geometry
    pipeline = WanImageToVideoPipeline(None, None, vae(16), None)
    _, condition = pipeline.prepare_latents(
        pixels[0], 1, 16, geometry.height, geometry.width, geometry.frames, torch.float32, "cpu",
        last_image=pixels[1] if len(pixels) > 1 else None,
    )  # fmt: skip
    return {"condition": condition.numpy(), "image": features(pixels)}


def expected_latent(
    family: Family, *, seed: int, images: list[Path], negative: str = NEGATIVE
) -> np.ndarray:
    """The final latent, from diffusers' models and Euler's steps."""
    texts = [embedding(family, text) for text in (PROMPT, negative.replace("&amp;", "&"))]
    config, geometry = family.config, family.geometry
    noise = np.random.default_rng(seed).standard_normal(
        (1, config.out_channels, *geometry.latent), np.float32
    )
    inputs = image_inputs(family, images) if images and config.condition_channels else {}
    first = None
    if images and not config.condition_channels:
        mean = vae(48).encode(pixels_of(images[0])[:, :, None]).latent_dist.mean.numpy()
        first = (mean - 0.1) / 0.8
    x = noise
    for sigma, after in pairwise(SIGMAS):
        frames = geometry.latent[0] if family_of(config).blends_first_frame else 1
        times = np.full(frames, 1000 * sigma, np.float32)
        if first is not None:
            x[:, :, :1], times[0] = first, 0
        given = [{**inputs, "latent": x, "timestep": times, "text": text} for text in texts]
        cond, uncond = (diffusers_velocity(family.models[0], config, call) for call in given)
        x = x + (after - sigma) * (uncond + GUIDANCE * (cond - uncond))
    if first is not None:
        x[:, :, :1] = first
    return x


def expected_video(latent: np.ndarray) -> np.ndarray:
    """[F, H, W, 3] from 0 to 255, by diffusers' VAE."""
    model = vae(latent.shape[1])
    shape = (1, -1, 1, 1, 1)
    mean, std = (torch.tensor(v).view(shape) for v in (model.config.latents_mean,
                                                       model.config.latents_std))  # fmt: skip
    pixels = model.decode(torch.from_numpy(latent) * std + mean).sample[0].clamp(-1, 1)
    return ((pixels.permute(1, 2, 3, 0) + 1) * 127.5).numpy()


def read_mp4(path: Path) -> tuple[np.ndarray, float]:
    """Frames in RGB and their rate."""
    with av.open(str(path)) as file:
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
        rate = file.streams.video[0].average_rate
        assert rate is not None
        return np.stack(frames), float(rate)


def assert_the_video_is(path: Path, expected: np.ndarray, fps: int) -> None:
    """Size, rate and length; and every frame more like its own than any other.

    H.264 is not lossless: the brightness of noise survives, its colour does not.
    """
    frames, rate = read_mp4(path)
    assert frames.shape == expected.shape and rate == fps
    grey = [
        video.astype(float).mean(axis=-1).reshape(len(video), -1) for video in (frames, expected)
    ]
    alike = np.corrcoef(*grey)[: len(frames), len(frames) :]
    assert (alike.argmax(axis=1) == np.arange(len(frames))).all()
    assert alike.diagonal().min() > 0.5


def saved_pictures(family: Family, folder: Path, number: int) -> list[Path]:
    paths = [folder / f"{seed}.png" for seed in range(number)]
    for seed, path in enumerate(paths):
        picture(family, seed).save(path)
    return paths


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """The frames of every video that is written, before H.264 takes from them."""
    frames: list[np.ndarray] = []
    encode = video_module._packets

    def keep(container: Any, size: Any, given: Any, fps: int) -> Any:
        frames.append(np.stack(list(given)))
        return encode(container, size, frames[-1], fps)

    monkeypatch.setattr(video_module, "_packets", keep)
    return frames


def assert_run_is_right(
    family: Family, folder: Path, written: list[np.ndarray], number_of_images: int = 0
) -> None:
    """A run to a latent and one to a video, against the oracle."""
    images = saved_pictures(family, folder, number_of_images)
    given = [word for pair in zip(("--image", "--last-image"), images) for word in pair]
    arguments = (family.bundle, "--prompt", PROMPT, "--negative", NEGATIVE, *SAMPLING, *given)
    expected = expected_latent(family, seed=5, images=images)
    run(*arguments, "--seed", 5, "-o", folder / "x.safetensors")
    latent = load_arrays(folder / "x.safetensors")["latent"]
    assert np.abs(latent - expected).max() <= 1e-4 * np.abs(expected).max()
    run(*arguments, "--seed", 5, "-o", folder / "x.mp4")
    video, fps = expected_video(expected), 24 if family.config.family == "ti2v" else 16
    assert np.abs(written[0] - video).max() <= 2  # of 255
    assert_the_video_is(folder / "x.mp4", video, fps)
    for output in ("x.safetensors", "x.mp4"):  # neither's record is the other's
        record = json.loads(sidecar(folder / output).read_text())
        assert Path(record["output"]) == folder / output and record["fps"] == fps


def test_text_to_video(t2v: Family, tmp_path: Path, written: list[np.ndarray]) -> None:
    assert_run_is_right(t2v, tmp_path, written)


def test_image_to_video_with_clip(i2v: Family, tmp_path: Path, written: list[np.ndarray]) -> None:
    assert_run_is_right(i2v, tmp_path, written, 1)


@pytest.mark.slow
def test_first_to_last_image(tmp_path: Path, written: list[np.ndarray]) -> None:
    assert_run_is_right(whole_family("flf2v-14b", tmp_path), tmp_path, written, 2)


@pytest.mark.parametrize("images", slow_but([0, 1], 1))
def test_text_or_image_to_video(
    images: int, ti2v: Family, tmp_path: Path, written: list[np.ndarray]
) -> None:
    assert_run_is_right(ti2v, tmp_path, written, images)


def official_parts(preset: str, folder: Path) -> tuple[Path, Path]:
    """Small parts in the official layout, and the same in diffusers' layout."""
    official, converted = folder / "official", folder / "converted"
    official.mkdir()
    text = official_encoders.state(official_encoders.text_shapes(TEXT_SIZES))
    text = {name: tensor.bfloat16() for name, tensor in text.items()}
    torch.save(text, official / T5)
    write_tokenizer(official / "google/umt5-xxl")
    write_tokenizer(converted / "tokenizer")
    version = "Wan2.2" if preset == "ti2v-5b" else "Wan2.1"
    shapes = json.loads(official_vae.GOLDEN.read_text())[version]["tiny"]
    torch.save(official_vae.weights(shapes), official / f"{version}_VAE.pth")
    clip = official_encoders.state(official_encoders.image_shapes(IMAGE_SIZES))
    torch.save(clip, official / CLIP)
    umt5_of(text, TEXT_SIZES).save_pretrained(converted / "text_encoder")
    clip_of(clip, IMAGE_SIZES).save_pretrained(converted / "image_encoder")
    open_vae(official / f"{version}_VAE.pth")._model.save_pretrained(converted / "vae")
    return official, converted


@pytest.mark.parametrize(
    ("preset", "pictures"), slow_but([("t2v", 0), ("i2v", 1), ("ti2v", 1)], "ti2v")
)
def test_the_official_layout_gives_the_same(
    preset: str,
    pictures: int,
    tmp_path: Path,
    written: list[np.ndarray],
    request: pytest.FixtureRequest,
) -> None:
    family: Family = request.getfixturevalue(preset)
    images = saved_pictures(family, tmp_path, pictures)
    given = [word for pair in zip(("--image", "--last-image"), images) for word in pair]
    layouts = official_parts("ti2v-5b" if preset == "ti2v" else preset, tmp_path)
    for layout, model in zip(("official", "diffusers"), layouts):
        arguments = (family.bundle, "--prompt", PROMPT, *SAMPLING, *given, "-m", model)
        record = run(*arguments, "-o", tmp_path / "x.mp4")
        assert record["components"]["layout"] == layout
        assert record["components"]["origin"] == str(model)
    np.testing.assert_array_equal(written[0], written[1])
    assert written[0].std() > 10  # it shows something


def test_the_record_repeats_the_run(i2v: Family, tmp_path: Path) -> None:
    (image,) = saved_pictures(i2v, tmp_path, 1)
    output = tmp_path / "a clip.mp4"
    prompt = 'it\'s "a" $red\ncircle'
    record = run(
        i2v.bundle, "--prompt", prompt, "--image", image, "--steps", 2, "--seed", 9, "-o", output
    )
    assert record == json.loads((tmp_path / "a clip.json").read_text())
    (engine,) = read_manifest(i2v.bundle).engines
    weights = read_manifest(i2v.bundle).weights
    assert record["key"] == engine.key and record["engine"] == engine.name
    assert record["weights"] == {name: w.file.sha256 for name, w in weights.items()}
    assert (record["prompt"], record["seed"]) == (prompt, 9)
    assert record["negative"] == FAMILIES["i2v"].negative
    assert (record["steps"], record["shift"], record["solver"]) == (2, 3.0, "unipc")
    assert record["guidance"] == [5.0, 5.0]
    assert (record["height"], record["width"], record["frames"]) == (32, 48, 9)
    assert record["fps"] == 16 and record["shape"] == [1, 16, 3, 4, 6]
    digest = hashlib.sha256(image.read_bytes()).hexdigest()
    assert record["image"] == {"path": str(image), "sha256": digest}
    assert record["components"]["vae"] == str(i2v.bundle.parent / "model" / "vae")
    assert {"wanexport", "torch", "diffusers", "tokenizers", "av"} <= record["versions"].keys()
    assert record["seconds"].keys() == {"text", "image", "sampling", "decode"}

    first = output.read_bytes()
    output.unlink()
    program, *arguments = shlex.split(record["command"])
    assert program == "wanexport"
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert output.read_bytes() == first
    assert invoke(*arguments).exit_code == 0  # the same command once more
    assert json.loads((tmp_path / "a clip.json").read_text())["command"] == record["command"]


def test_the_command_names_every_option_of_a_distilled_run(t2v: Family, tmp_path: Path) -> None:
    output = tmp_path / "x.safetensors"
    record = run(
        t2v.bundle,
        "--prompt",
        PROMPT,
        "--timesteps",
        "1000,500.5",
        "--provider",
        "cpu",
        "-o",
        output,
    )
    words = shlex.split(record["command"])
    given = dict(zip(words[3::2], words[4::2]))
    assert given["--timesteps"] == "1000.0,500.5" and given["--guidance"] == "1.0"
    assert given["--provider"] == "cpu" and given["--solver"] == "euler"
    assert {"--steps", "--shift", "--negative", "--image"}.isdisjoint(given)
    assert record["negative"] is None and record["shift"] is None


def test_text_embeddings_are_decoded_too(
    t2v: Family, tmp_path: Path, written: list[np.ndarray]
) -> None:
    texts = {name: embedding(t2v, text) for name, text in (("text", PROMPT), ("negative", "still"))}
    save_arrays(tmp_path / "text.safetensors", texts)
    text = ("--text", tmp_path / "text.safetensors")
    prompt = ("--prompt", PROMPT, "--negative", "still")
    for given in (prompt, text):
        record = run(t2v.bundle, *given, *SAMPLING, "--seed", 2, "-o", tmp_path / "x.mp4")
    assert np.abs(written[0].astype(int) - written[1]).max() <= 1
    assert_the_video_is(tmp_path / "x.mp4", written[0], 16)
    digest = hashlib.sha256((tmp_path / "text.safetensors").read_bytes()).hexdigest()
    assert record["text"]["sha256"] == digest and "--text" in record["command"]
    assert invoke(*shlex.split(record["command"])[1:]).exit_code == 0


def test_the_user_sees_each_stage_and_the_encoder_is_gone_before_the_denoising(
    t2v: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    close = UMT5TextEncoder.close

    def close_and_say(encoder: UMT5TextEncoder) -> None:
        events.append("closed")
        close(encoder)

    monkeypatch.setattr(UMT5TextEncoder, "close", close_and_say)
    request = RunRequest(t2v.bundle, tmp_path / "x.mp4", prompt=PROMPT, settings=Settings(steps=3))
    generate.run(request, show=lambda stage, done, of: events.append(stage), tell=events.append)
    named = NAMED.format(t2v.bundle.parent / "model")
    stages = [event if event.startswith("taking") else event.partition(",")[0] for event in events]
    assert list(dict.fromkeys(stages)) == [
        "opening the engine", "finding the encoders and the VAE", named,
        "encoding the prompt", "closed", "sampling", "decoding and writing the video",
    ]  # fmt: skip
    assert any(event.endswith(" s/step") for event in events)


def test_the_user_is_told_once_what_became_of_the_image(ti2v: Family, tmp_path: Path) -> None:
    image = tmp_path / "wide.png"
    Image.new("RGB", (300, 100)).save(image)
    result = invoke(
        "run", ti2v.bundle, "--prompt", PROMPT, "--image", image, *SAMPLING,
        "-o", tmp_path / "x.safetensors",
    )  # fmt: skip
    note = (
        "wide.png, 100x300 pixels (height x width), was cut to its middle 100x150, scaled to 64x96"
    )
    assert result.exit_code == 0 and result.stderr.count(note) == 1
    assert result.stderr.startswith("note: ")
    record = json.loads((tmp_path / "x.safetensors.json").read_text())
    assert len(record["notes"]) == 1 and record["notes"][0].startswith(note)
    assert "seed 0" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--prompt", "x", "--text", "{tmp}/text", "-o", "x.mp4"), "one of --prompt TEXT and"),
        (("-o", "{tmp}/x.mp4"), "one of --prompt TEXT and --text FILE"),
        (("--text", "x", "--negative", "y", "--image", "z", "-o", "{tmp}/x.mp4"),
         "--negative, --image goes with --prompt"),
        (("--prompt", "x", "-o", "{tmp}/x.gif"), "an .mp4 file, latents to a .safetensors"),
        (("--prompt", "x", "-o", "{tmp}/no/x.mp4"), "no/x.mp4 (No such file or directory): name a"),
        (("--prompt", "x", "-o", "{tmp}/" + "x" * 247 + ".mp4"), "(File name too long): name a"),
        (("--prompt", "x", "-o", "{tmp}/" + "x" * 300 + ".mp4"), "(File name too long): name a"),
        (("--prompt", "x", "--image", "{tmp}/x.mp4", "-o", "{tmp}/x.mp4"), "is read by this run"),
        (("--text", "{tmp}/x.safetensors", "-o", "{tmp}/x.safetensors"), "is read by this run"),
        (("--text", "x", "-m", "y", "-o", "{tmp}/y.safetensors"), "-m is where the VAE comes from"),
        (("--prompt", "x", "-o", "{tmp}/taken.mp4"), "taken.json, where the record goes, is no"),
        (("--prompt", "x", "--image", "{tmp}/0.png", "-o", "{tmp}/y.mp4"), "takes no image"),
        (("--prompt", "x", "--last-image", "{tmp}/0.png", "-o", "{tmp}/y.mp4"), "no last image"),
        (("--prompt", "x", "--solver", "unipc", "--steps", "3", "--timesteps", "9", "-o",
          "{tmp}/y.mp4"), "leave out steps"),
        (("--prompt", "x", "-m", "{tmp}", "-o", "{tmp}/y.mp4"), "lacks the text encoder"),
        (("--prompt", "x", "-m", "{tmp}/gone/gone", "-o", "{tmp}/y.mp4"), "does not exist"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_in_one_line_and_leaves_nothing(
    arguments: tuple[str, ...], said: str, t2v: Family, tmp_path: Path
) -> None:
    saved_pictures(t2v, tmp_path, 1)
    (tmp_path / "taken.json").write_text("{}")
    for name in ("x.mp4", "x.safetensors"):
        (tmp_path / name).touch()
    before = sorted(tmp_path.iterdir())
    filled = [argument.format(tmp=tmp_path) for argument in arguments]
    assert said in refusal_of(t2v.bundle, *filled)
    assert sorted(tmp_path.iterdir()) == before


def refuse_memory(*_: object) -> None:
    raise WanExportError("memory does not suffice")


def refuse_disk(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("owner", "name", "refuse", "said"),
    [
        (Vae, "decode", refuse_memory, "memory does not suffice"),
        (video_module, "_packets", refuse_disk, "No space left on device"),
    ],
)
@pytest.mark.parametrize("source", slow_but(["--prompt", "--text"], "--text"))
def test_the_latent_survives_a_failure_after_the_sampling(
    source: str,
    owner: Any,
    name: str,
    refuse: Any,
    said: str,
    t2v: Family,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = {name: embedding(t2v, text) for name, text in (("text", PROMPT), ("negative", "still"))}
    save_arrays(tmp_path / "text.safetensors", texts)
    given = tmp_path / "text.safetensors" if source == "--text" else PROMPT
    arguments = (t2v.bundle, source, given, *SAMPLING)
    run(*arguments, "-o", tmp_path / "latent.safetensors")
    monkeypatch.setattr(owner, name, refuse)
    (tmp_path / "x.safetensors").write_text("the user's")
    for output, kept in (("y.mp4", "y.safetensors"), ("x.mp4", "x.1.safetensors")):
        message = refusal_of(*arguments, "-o", tmp_path / output)
        assert said in message
        assert message.endswith(f"; the latent is saved as {tmp_path / kept}")
        saved, expected = (
            load_arrays(tmp_path / file)["latent"] for file in (kept, "latent.safetensors")
        )
        np.testing.assert_array_equal(saved, expected)
    assert (tmp_path / "x.safetensors").read_text() == "the user's"
    assert not list(tmp_path.glob("*.mp4"))


def test_a_fault_of_ours_after_the_sampling_is_traced_and_says_where_the_latent_is(
    t2v: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Vae, "decode", fail)
    result = invoke("run", t2v.bundle, "--prompt", PROMPT, *SAMPLING, "-o", tmp_path / "x.mp4")
    assert isinstance(result.exception, ZeroDivisionError)
    named = f"note: {NAMED.format(t2v.bundle.parent / 'model')}\n"
    assert result.stderr == f"{named}note: the latent is saved as {tmp_path / 'x.safetensors'}\n"
    assert load_arrays(tmp_path / "x.safetensors")["latent"].shape == (1, 16, 3, 4, 6)
    # Before the last step there is nothing to save.
    monkeypatch.setattr(Session, "__call__", fail)
    result = invoke("run", t2v.bundle, "--prompt", PROMPT, *SAMPLING, "-o", tmp_path / "y.mp4")
    assert isinstance(result.exception, ZeroDivisionError) and result.stderr == named
    assert not list(tmp_path.glob("y*"))


def test_a_negative_prompt_without_guidance_is_remarked_on(t2v: Family, tmp_path: Path) -> None:
    arguments = ("run", t2v.bundle, "--prompt", PROMPT, "--negative", "x", "--timesteps", "1000,5")
    output = ("-o", tmp_path / "x.safetensors")
    said = "note: --negative changes nothing here: guidance is 1 in every step"
    assert invoke(*arguments, *output).stderr.startswith(said)
    assert "--negative" not in invoke(*arguments, "--guidance", 2, *output, "--overwrite").stderr


def test_images_that_do_not_fit_the_model(i2v: Family, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    arguments = (i2v.bundle, "--prompt", PROMPT, "-o", tmp_path / "x.mp4")
    assert "give it a first image (--image)" in refusal_of(*arguments)
    (image,) = saved_pictures(i2v, tmp_path, 1)
    both = ("--image", image, "--last-image", image)
    assert "leave out the last image" in refusal_of(*arguments, *both)
    message = refusal_of(*arguments, "--image", tmp_path / "text.png")
    assert "cannot read" in message and "it is none" in message


def test_a_checkpoint_of_another_model_is_refused_before_the_sampling(
    t2v: Family, ti2v: Family, tmp_path: Path
) -> None:
    other = ti2v.bundle.parent / "model"
    arguments = ("--prompt", PROMPT, *SAMPLING, "-o", tmp_path / "x.mp4")
    message = refusal_of(t2v.bundle, "-m", other, *arguments)
    assert f"the VAE of {other} has 48 latent channels" in message
    narrow = tmp_path / "model"
    config = UMT5Config(vocab_size=64, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    UMT5EncoderModel(config).save_pretrained(narrow / "text_encoder")
    write_tokenizer(narrow / "tokenizer")
    vae(16).save_pretrained(narrow / "vae")
    message = refusal_of(t2v.bundle, "-m", narrow, *arguments)
    assert "gives 8 values a token" in message and "takes 4096" in message


def test_a_bundle_without_its_encoders_says_where_to_get_them(t2v: Family, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(t2v.bundle, tmp_path / "bundle"))
    manifest = read_manifest(bundle)
    source = {"random_seed": 0, "preset": "t2v-1.3b"}
    random = {name: replace(w, source=source) for name, w in manifest.weights.items()}
    write_manifest(bundle, replace(manifest, weights=random))
    save_arrays(tmp_path / "text.safetensors", {"text": np.ones((1, 4096), np.float32)})
    message = refusal_of(bundle, "--prompt", PROMPT, "-o", tmp_path / "x.mp4")
    assert "random weights" in message and "(-m, model=), as Wan-AI/Wan2.1-T2V-1.3B" in message
    text = ("--text", tmp_path / "text.safetensors", "--guidance", 1)
    message = refusal_of(bundle, *text, "-o", tmp_path / "x.mp4")
    assert "name a checkpoint that has the VAE (-m" in message


@pytest.mark.parametrize("package", ["av", "PIL", "diffusers", "tokenizers", "ftfy"])
def test_a_missing_package_is_named_in_one_line_before_the_sampling(
    package: str, i2v: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (image,) = saved_pictures(i2v, tmp_path, 1)
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delattr(Session, "__call__")
    message = refusal_of(
        i2v.bundle, "--prompt", PROMPT, "--image", image, *SAMPLING, "-o", tmp_path / "x.mp4"
    )
    assert package in message and message.endswith("pip install '.[pipeline]'")
    assert not (tmp_path / "x.mp4").exists()
