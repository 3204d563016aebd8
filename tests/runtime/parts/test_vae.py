"""The VAE against the official code's recorded values, in both layouts; its tiles and refusals."""

import json
import logging
import shutil
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from tests.oracles.official_vae import (
    CHANNELS,
    EVERY_LATENT,
    EVERY_PIXEL,
    FRAMES,
    GOLDEN,
    STRIDES,
    latent,
    video,
    weights,
)
from wanexport.runtime.errors import (
    BadRequest,
    BundleError,
    EngineFailure,
    WanExportError,
    WanExportWarning,
)
from wanexport.runtime.parts import vae as vae_module
from wanexport.runtime.parts.vae import Vae, needed_bytes, open_vae
from wanexport.runtime.parts.vae_keys import config_of, diffusers_name
from wanexport.runtime.parts.vae_tiling import run_tiled

VERSIONS = ("Wan2.1", "Wan2.2")
OFFICIAL: dict[str, Any] = json.loads(GOLDEN.read_text())
HIGH = np.linspace(-2, 2, 16 * 40 * 2, dtype=np.float32).reshape(1, 16, 1, 40, 2)  # 320x16 pixels


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny official file of each version, with the tensors that the golden values are of."""
    folder = tmp_path_factory.mktemp("vae")
    paths = {version: folder / f"{version}_VAE.pth" for version in VERSIONS}
    for version, path in paths.items():
        torch.save(weights(OFFICIAL[version]["tiny"]), path)
    return paths


@pytest.fixture(scope="module")
def folder(files: dict[str, Path]) -> Path:
    """The tiny Wan2.2 VAE in diffusers' layout, written by diffusers."""
    config = config_of(tiny_shapes("Wan2.2"), files["Wan2.2"])
    model = AutoencoderKLWan(**config)
    state = torch.load(files["Wan2.2"], weights_only=True)
    model.load_state_dict({diffusers_name(name): tensor for name, tensor in state.items()})
    path = files["Wan2.2"].parent / "vae"
    model.save_pretrained(path)
    return path


@pytest.fixture
def vae(files: dict[str, Path]) -> Vae:
    return open_vae(files["Wan2.1"])


def tiny_shapes(version: str) -> dict[str, tuple[int, ...]]:
    return {name: tuple(shape) for name, shape in OFFICIAL[version]["tiny"].items()}


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("Wan2.1", {"base_dim": 96, "z_dim": 16, "in_channels": 3, "patch_size": None}),
        ("Wan2.2", {"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "in_channels": 12,
                    "out_channels": 12, "is_residual": True, "patch_size": 2,
                    "scale_factor_spatial": 16}),
    ],
)  # fmt: skip
def test_the_published_files_fill_diffusers_model(version: str, expected: dict[str, Any]) -> None:
    shapes = {name: tuple(shape) for name, shape in OFFICIAL[version]["full"].items()}
    config = config_of(shapes, Path("x"))
    assert expected.items() <= config.items()
    with torch.device("meta"):
        state = AutoencoderKLWan(**config).state_dict()
    assert {diffusers_name(name): shape for name, shape in shapes.items()} == {
        name: tuple(tensor.shape) for name, tensor in state.items()
    }


@pytest.mark.parametrize("frames", FRAMES)
@pytest.mark.parametrize("version", VERSIONS)
def test_latents_are_the_official_codes(files: dict[str, Path], version: str, frames: int) -> None:
    found = open_vae(files[version]).encode(video(frames).numpy())
    assert found.shape[1:] == tuple(latent(version, frames).shape)
    assert found.dtype == np.float32
    expected = OFFICIAL[version]["encoded"][str(frames)]
    np.testing.assert_allclose(found.flatten()[::EVERY_LATENT], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("frames", FRAMES)
@pytest.mark.parametrize("version", VERSIONS)
def test_frames_are_the_official_codes(files: dict[str, Path], version: str, frames: int) -> None:
    found = open_vae(files[version]).decode(latent(version, frames)[None])
    assert found.shape == (frames, *video(1).shape[2:], 3)
    assert found.dtype == np.uint8
    kept = found.transpose(3, 0, 1, 2).flatten()[::EVERY_PIXEL]
    levels = (np.array(OFFICIAL[version]["decoded"][str(frames)]) + 1) / 2 * 255
    # 1e-5 of [-1, 1] may move a value over a whole number, below which the fraction is cut.
    assert (kept >= np.floor(levels - 2e-3)).all()
    assert (kept <= np.floor(levels + 2e-3)).all()


@pytest.mark.parametrize("version", VERSIONS)
def test_channels_and_stride_are_known(files: dict[str, Path], version: str) -> None:
    vae = open_vae(files[version])
    assert (vae.channels, vae.spatial_stride) == (CHANNELS[version], STRIDES[version])


def test_both_layouts_compute_the_same(files: dict[str, Path], folder: Path) -> None:
    official, diffusers = open_vae(files["Wan2.2"]), open_vae(folder)
    assert diffusers.spatial_stride == 16
    np.testing.assert_array_equal(official.encode(video(5)), diffusers.encode(video(5)))
    z = latent("Wan2.2", 5)[None]
    np.testing.assert_array_equal(official.decode(z), diffusers.decode(z))


def test_half_precision_files_compute_in_fp32(files: dict[str, Path], tmp_path: Path) -> None:
    state = torch.load(files["Wan2.1"], weights_only=True)
    torch.save({name: tensor.bfloat16() for name, tensor in state.items()}, tmp_path / "bf16.pth")
    torch.save({n: t.bfloat16().float() for n, t in state.items()}, tmp_path / "fp32.pth")
    found, expected = (
        open_vae(tmp_path / name).encode(video(1)) for name in ("bf16.pth", "fp32.pth")
    )
    np.testing.assert_array_equal(found, expected)


def test_autocast_of_the_caller_rounds_nothing(vae: Vae) -> None:
    expected = vae.encode(video(1))
    with torch.autocast("cpu", torch.bfloat16):
        np.testing.assert_array_equal(vae.encode(video(1)), expected)


def test_a_closed_vae_is_freed(vae: Vae) -> None:
    model = weakref.ref(vae._model)
    vae.close()
    vae.close()
    assert model() is None
    with pytest.raises(EngineFailure, match="the VAE is closed: open it again"):
        vae.encode(video(1))


@pytest.mark.parametrize("sides", [(6, 5), (16, 16), (17, 40), (47, 16)])
@pytest.mark.parametrize(
    ("function", "scale_in", "scale_out"),
    [
        (lambda x: x.repeat_interleave(4, 3).repeat_interleave(4, 4), 1, 4),
        (lambda x: functional.avg_pool3d(x, (1, 4, 4)), 4, 1),
    ],
)
def test_tiles_of_what_is_local_make_the_whole(
    sides: tuple[int, int], function: Callable[[Tensor], Tensor], scale_in: int, scale_out: int
) -> None:
    batch = torch.randn(1, 3, 2, *(side * scale_in for side in sides))
    found = run_tiled(function, batch, tile=16, overlap=4, scale_in=scale_in, scale_out=scale_out)
    torch.testing.assert_close(found, function(batch), atol=1e-6, rtol=1e-6)


def test_tiles_fade_into_each_other() -> None:
    values = iter((0.0, 1.0))
    found = run_tiled(
        lambda part: torch.full_like(part, next(values)),
        torch.zeros(1, 1, 1, 1, 10),
        tile=6,
        overlap=2,
        scale_in=1,
        scale_out=1,
    )
    torch.testing.assert_close(
        found.flatten(), torch.tensor([0, 0, 0, 0, 1 / 3, 2 / 3, 1, 1, 1, 1])
    )


def test_a_picture_is_cut_only_where_the_machine_is_small(
    vae: Vae, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = open_vae(files["Wan2.1"]).decode(HIGH)
    monkeypatch.setattr(vae_module, "physical_bytes", lambda: 10**6)
    tiled = vae.decode(HIGH)
    assert vae.tiled
    assert tiled.shape == whole.shape
    assert (tiled != whole).any()
    assert vae.decode(HIGH[:, :, :, :32]).shape == (1, 256, 16, 3)
    assert not vae.tiled


def test_what_is_free_at_the_moment_changes_no_pixel(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = open_vae(files["Wan2.1"]).decode(HIGH)
    monkeypatch.setattr(vae_module, "available_bytes", lambda: 10**6)
    other = open_vae(files["Wan2.1"])
    with pytest.warns(WanExportWarning, match=r"decode 320x16 needs 0\.1 GB .* 0\.0 GB are free"):
        np.testing.assert_array_equal(other.decode(HIGH), whole)
    assert not other.tiled


def test_a_shape_stays_as_it_was_decided(vae: Vae, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, whose memory others fill and free between two calls."""
    small, large = Gpu(vae, height=32), Gpu(vae, height=400)
    monkeypatch.setattr(vae, "_decode", small)
    tiled = vae.decode(HIGH)
    monkeypatch.setattr(vae, "_decode", large)
    np.testing.assert_array_equal(vae.decode(HIGH), tiled)
    assert vae.tiled
    wide = HIGH.transpose(0, 1, 2, 4, 3)
    vae.decode(wide)
    assert not vae.tiled
    monkeypatch.setattr(vae, "_decode", Gpu(vae, height=1))
    with pytest.raises(EngineFailure, match="the GPU's memory does not suffice"):
        vae.decode(wide)


@pytest.mark.parametrize("task", ["encode", "decode"])
@pytest.mark.parametrize("version", VERSIONS)
def test_tiling_can_be_asked_for(files: dict[str, Path], version: str, task: str) -> None:
    stride, channels = STRIDES[version], CHANNELS[version]
    shape = {"encode": (3, 5, 32, 320), "decode": (1, channels, 2, 32 // stride, 320 // stride)}
    array = np.random.default_rng(0).uniform(-1, 1, shape[task]).astype(np.float32)
    cut, whole = (open_vae(files[version], tiling=tiling) for tiling in (True, False))
    found, expected = getattr(cut, task)(array), getattr(whole, task)(array)
    assert (cut.tiled, whole.tiled) == (True, False)
    assert found.shape == expected.shape
    difference = np.abs(found.astype(np.float64) - expected).mean()
    assert 0 < difference < 0.2 * expected.std()


class Gpu:
    """A GPU's memory in the model's place: it refuses pictures above a height, then computes."""

    def __init__(self, vae: Vae, height: int) -> None:
        self.decode = vae._decode
        self.height = height

    def __call__(self, latent: Tensor) -> Tensor:
        if latent.shape[3] > self.height:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.decode(latent)


def test_tiles_are_tried_where_the_gpu_refuses_the_whole(
    vae: Vae, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vae, "_decode", Gpu(vae, height=32))
    found = vae.decode(HIGH)
    assert vae.tiled
    np.testing.assert_array_equal(found, open_vae(files["Wan2.1"], tiling=True).decode(HIGH))


@pytest.mark.parametrize(("tiling", "height"), [(None, 16), (False, 32), (True, 16)])
def test_a_gpu_without_memory_is_one_line(
    vae: Vae, monkeypatch: pytest.MonkeyPatch, tiling: bool | None, height: int
) -> None:
    vae.tiling = tiling
    monkeypatch.setattr(vae, "_decode", Gpu(vae, height))
    with pytest.raises(EngineFailure, match=r"the GPU's memory .* decode 320x16, with .* GB free"):
        vae.decode(HIGH)


def test_a_gpu_that_does_not_hold_the_vae_is_one_line(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(AutoencoderKLWan, "to", refuse)
    with pytest.raises(EngineFailure, match=r"GB free, which do not hold the VAE: free some"):
        open_vae(files["Wan2.1"])


@pytest.mark.parametrize("tiling", [None, False])
def test_what_can_never_fit_is_refused(
    vae: Vae, monkeypatch: pytest.MonkeyPatch, tiling: bool | None
) -> None:
    vae.tiling = tiling
    monkeypatch.setattr(vae_module, "limit_bytes", lambda: 2 * 10**7)
    with pytest.raises(EngineFailure, match=r"decode 320x16 needs 0\.1 GB of memory, of 0\.0 GB"):
        vae.decode(HIGH)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros((1, 48, 1, 4, 4)), r"shape \[1, 48, 1, 4, 4\].* takes \[1, 16, F, h, w\]"),
        (np.zeros((2, 16, 1, 4, 4)), r"takes \[1, 16, F, h, w\]"),
        (np.zeros((16, 1, 4, 4)), r"takes \[1, 16, F, h, w\]"),
        (np.zeros((1, 16, 0, 4, 4)), r"takes \[1, 16, F, h, w\]"),
        (np.full((1, 16, 1, 4, 4), np.nan), "decode 256 values that are NaN or Inf"),
        ("text", "no array of numbers"),
    ],
)
def test_what_is_no_latent_is_refused(vae: Vae, value: Any, message: str) -> None:
    with pytest.raises(WanExportError, match=message):
        vae.decode(value)


@pytest.mark.parametrize(
    "shape",
    [(3, 4, 16, 16), (3, 0, 16, 16), (3, 1, 12, 16), (3, 1, 16, 0), (1, 1, 16, 16), (3, 16, 16)],
)
def test_what_is_no_video_is_refused(vae: Vae, shape: tuple[int, ...]) -> None:
    with pytest.raises(BadRequest, match=r"expected \[3, F, H, W\], F of 4k\+1"):
        vae.encode(np.zeros(shape, np.float32))


def test_a_video_with_nan_is_refused(vae: Vae) -> None:
    with pytest.raises(BadRequest, match="cannot encode 768 values that are NaN or Inf"):
        vae.encode(np.full((3, 1, 16, 16), np.inf, np.float32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder.conv1.weight": None}, "no Wan VAE: it has no encoder.conv1.weight of rank 5"),
        ({"conv2.weight": torch.zeros(8, 8, 1, 1, 1)}, "latents of 8 channels: expected 16"),
        ({"decoder.middle.1.proj.bias": None}, "missing decoder.mid_block.attentions.0.proj.bias"),
        ({"decoder.upsamples.15.residual.0.gamma": torch.zeros(4)}, "unexpected decoder.up_blocks"),
        ({"discriminator.weight": torch.zeros(4)}, "unexpected discriminator.weight"),
        ({"conv1.bias": torch.zeros(3)}, r"quant_conv.bias is \[3\], expected \[32\]"),
    ],
)
def test_another_models_file_is_refused(
    files: dict[str, Path], tmp_path: Path, changes: dict[str, Tensor | None], message: str
) -> None:
    state = {**torch.load(files["Wan2.1"], weights_only=True), **changes}
    path = tmp_path / "VAE.pth"
    torch.save({name: tensor for name, tensor in state.items() if tensor is not None}, path)
    with pytest.raises(BundleError, match=message) as raised:
        open_vae(path)
    assert str(path) in str(raised.value)


def test_a_cut_or_missing_file_is_one_line(files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "cut.pth").write_bytes(files["Wan2.1"].read_bytes()[:5000])
    for name in ("cut.pth", "none.pth"):
        with pytest.raises(BundleError, match=name) as raised:
            open_vae(tmp_path / name)
        assert "\n" not in str(raised.value)


def damage_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def name_another_class(folder: Path) -> None:
    (folder / "config.json").write_text('{"_class_name": "AutoencoderKL"}')


def cut_weights(folder: Path) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def remove_weights(folder: Path) -> None:
    (folder / "diffusion_pytorch_model.safetensors").unlink()


def drop_a_tensor(folder: Path) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["quant_conv.bias"]
    save_file(tensors, path, {"format": "pt"})


def add_a_tensor(folder: Path) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(path), "extra": torch.zeros(1)}, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_config, "config.json is missing or damaged"),
        (name_another_class, "config.json is of 'AutoencoderKL': expected AutoencoderKLWan"),
        (cut_weights, "cannot read the VAE in"),
        (remove_weights, "cannot read the VAE in"),
        (drop_a_tensor, "1 tensors are missing or unexpected, quant_conv.bias"),
        (add_a_tensor, "1 tensors are missing or unexpected, extra"),
    ],
)
def test_a_damaged_folder_is_one_line(
    folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)  # to caplog
    copy = Path(shutil.copytree(folder, tmp_path / "vae"))
    damage(copy)
    with pytest.raises(BundleError, match=message) as raised:
        open_vae(copy)
    assert "\n" not in str(raised.value)
    assert not caplog.records


@pytest.mark.parametrize("package", ["torch", "diffusers"])
def test_a_missing_package_is_one_line(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(WanExportError, match=rf"needs {package}; .*'\.\[pipeline\]'"):
        open_vae(files["Wan2.1"])


@pytest.mark.parametrize(
    ("version", "task", "frames", "size", "measured"),
    [
        ("Wan2.1", "decode", 1, (240, 416), 1.020),
        ("Wan2.1", "decode", 3, (240, 416), 2.426),
        ("Wan2.1", "encode", 1, (240, 416), 0.516),
        ("Wan2.1", "encode", 3, (240, 416), 1.863),
        ("Wan2.2", "decode", 1, (256, 416), 0.951),
        ("Wan2.2", "decode", 3, (256, 416), 2.618),
        ("Wan2.2", "encode", 2, (256, 416), 0.870),
    ],
)
def test_the_estimate_of_memory_is_what_was_measured(
    version: str, task: str, frames: int, size: tuple[int, int], measured: float
) -> None:
    """Peaks in GB by tests/tables/vae_memory.py, on one core."""
    shapes = {name: tuple(shape) for name, shape in OFFICIAL[version]["full"].items()}
    with torch.device("meta"):
        config = AutoencoderKLWan(**config_of(shapes, GOLDEN)).config
    estimate = needed_bytes(config, task, frames, *size) / 1e9
    assert measured < estimate < 1.25 * measured


@pytest.mark.gpu
@pytest.mark.parametrize("version", VERSIONS)
def test_a_video_on_the_gpu_gives_the_same_bits(files: dict[str, Path], version: str) -> None:
    vae = open_vae(files[version], device="cuda")
    near = vae.encode(video(5).numpy())
    np.testing.assert_array_equal(vae.encode(video(5).cuda()), near)


def test_a_video_that_is_not_on_the_host_is_taken_where_it_is(
    vae: Vae, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU tensor stands for a GPU's, as long as nobody asks for it as an array."""
    expected = vae.encode(video(5).numpy())

    def refuse(value: object) -> None:
        raise AssertionError("the host copies it")

    monkeypatch.setattr(vae_module, "is_on_gpu", lambda value: isinstance(value, torch.Tensor))
    monkeypatch.setattr(vae_module, "count_not_finite", lambda value: 0)
    monkeypatch.setattr(vae_module, "to_numpy", refuse)
    np.testing.assert_array_equal(vae.encode(video(5)), expected)
    with pytest.raises(BadRequest, match=r"shape \[3, 5, 17, 16\] cannot be encoded"):
        vae.encode(torch.zeros(3, 5, 17, 16))
