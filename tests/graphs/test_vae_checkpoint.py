"""Checkpoints of the VAE in both layouts become one weights file; what is none is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from torch import Tensor

from tests.oracles.official_vae import weights
from tests.oracles.small_vae import OFFICIAL, VERSIONS, official_file
from wanexport.graphs.vae_checkpoint import VaeWeights, open_vae_checkpoint
from wanexport.graphs.weights import write_tensors
from wanexport.runtime.bundle.tensorfile import load_arrays
from wanexport.runtime.bundle.vae_signature import vae_layout_sha256, vae_weights_layout
from wanexport.runtime.errors import WanExportError
from wanexport.runtime.parts.vae_keys import config_of, diffusers_name
from wanexport.runtime.vae_config import VaeConfig


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("vae")
    return {version: official_file(version, folder) for version in VERSIONS}


def state_of(version: str) -> dict[str, Tensor]:
    return weights(OFFICIAL[version]["tiny"])


def diffusers_folder(version: str, path: Path) -> Path:
    """The same tensors as diffusers writes them."""
    shapes = {name: tuple(shape) for name, shape in OFFICIAL[version]["tiny"].items()}
    model = AutoencoderKLWan(**config_of(shapes, path))
    model.load_state_dict({diffusers_name(n): t for n, t in state_of(version).items()})
    model.save_pretrained(path)
    return path


def written(path: Path, folder: Path, dtype: str = "fp32") -> dict[str, np.ndarray]:
    checkpoint = open_vae_checkpoint(path)
    file = folder / "vae.safetensors"
    write_tensors(file, vae_weights_layout(checkpoint.config, dtype), VaeWeights(checkpoint))
    return load_arrays(file)


@pytest.mark.parametrize("version", VERSIONS)
def test_both_layouts_make_the_same_file(
    files: dict[str, Path], version: str, tmp_path: Path
) -> None:
    folder = diffusers_folder(version, tmp_path / "vae")
    own, other = open_vae_checkpoint(files[version]), open_vae_checkpoint(folder)
    assert (own.layout, other.layout) == ("official", "diffusers")
    assert own.config == other.config
    one, two = written(files[version], tmp_path), written(folder, tmp_path)
    assert one.keys() == two.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(two[name], array)
    save_file(state_of(version), tmp_path / "vae.sft.safetensors")
    assert open_vae_checkpoint(tmp_path / "vae.sft.safetensors").config == own.config


def test_input_channels_come_last_and_statistics_beside_them(
    files: dict[str, Path], tmp_path: Path
) -> None:
    found, state = written(files["Wan2.1"], tmp_path), state_of("Wan2.1")
    kernel = state["decoder.conv1.weight"].permute(0, 2, 3, 4, 1).numpy()
    np.testing.assert_array_equal(found["decoder.conv_in.weight"], kernel)
    resampling = state["decoder.upsamples.3.resample.1.weight"].permute(0, 2, 3, 1)[:, None]
    name = "decoder.up_blocks.0.upsamplers.0.resample.1.weight"
    np.testing.assert_array_equal(found[name], resampling.numpy())
    np.testing.assert_array_equal(
        found["decoder.mid_block.attentions.0.to_qkv.weight"],
        state["decoder.middle.1.to_qkv.weight"][:, :, 0, 0].numpy(),
    )
    assert found["latents_mean"][0] == np.float32(-0.7571)
    assert found["latents_scale"][0] == np.float32(1) / np.float32(2.8184)


def test_an_engine_that_decodes_in_bf16_encodes_with_fp32_weights(
    files: dict[str, Path], tmp_path: Path
) -> None:
    exact, rounded = (written(files["Wan2.2"], tmp_path, dtype) for dtype in ("fp32", "bf16"))
    differing = {name for name in exact if (exact[name] != rounded[name]).any()}
    assert differing and all(
        name.startswith("decoder.") and name.endswith(".weight") for name in differing
    )
    sizes = open_vae_checkpoint(files["Wan2.2"]).config
    assert vae_layout_sha256(sizes, "bf16") != vae_layout_sha256(sizes, "fp32")


def test_another_content_has_another_digest(files: dict[str, Path], tmp_path: Path) -> None:
    digest = VaeWeights(open_vae_checkpoint(files["Wan2.1"])).digest()
    assert VaeWeights(open_vae_checkpoint(files["Wan2.1"])).digest() == digest
    state = state_of("Wan2.1")
    state["conv1.bias"][0] += 1
    torch.save(state, tmp_path / "other.pth")
    assert VaeWeights(open_vae_checkpoint(tmp_path / "other.pth")).digest() != digest
    folder = diffusers_folder("Wan2.1", tmp_path / "vae")
    before = VaeWeights(open_vae_checkpoint(folder)).digest()
    change_config(folder, latents_std=[2.0] * 16)
    assert VaeWeights(open_vae_checkpoint(folder)).digest() != before


@pytest.mark.parametrize("version", VERSIONS)
def test_sizes_are_read_from_the_tensors(files: dict[str, Path], version: str) -> None:
    sizes = {"Wan2.1": VaeConfig(16, 4, 4, False), "Wan2.2": VaeConfig(48, 4, 8, True)}
    assert open_vae_checkpoint(files[version]).config == sizes[version]
    assert sizes[version].spatial_stride == {"Wan2.1": 8, "Wan2.2": 16}[version]


def change_config(folder: Path, **changes: Any) -> None:
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**data, **changes}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: change_config(f, _class_name="AutoencoderKL"), "is of AutoencoderKL: expected"),
        (lambda f: change_config(f, dim_mult=[1, 2, 4, 8]), r"dim_mult \[1, 2, 4, 8\]: every VAE"),
        (lambda f: change_config(f, latents_std=[1.0] * 15), "no latents_mean and latents_std of"),
        (lambda f: change_config(f, latents_std=[0.0] * 16), "has a latents_std of 0"),
        (lambda f: (f / "config.json").unlink(), "is of nothing: expected AutoencoderKLWan"),
        (lambda f: (f / "config.json").write_text("{"), "cannot read .*config.json"),
        (
            lambda f: (f / "diffusion_pytorch_model.safetensors").unlink(),
            "has no diffusion_pytorch_model",
        ),
    ],
)
def test_a_folder_that_is_no_vae_of_wan_is_refused(
    tmp_path: Path, change: Callable[[Path], object], message: str
) -> None:
    folder = diffusers_folder("Wan2.1", tmp_path / "vae")
    change(folder)
    with pytest.raises(WanExportError, match=message) as raised:
        open_vae_checkpoint(folder)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conv2.weight": None}, "no VAE of Wan: it has no post_quant_conv.weight of rank 5"),
        ({"decoder.middle.1.proj.bias": None}, "missing decoder.mid_block.attentions.0.proj.bias"),
        ({"discriminator.weight": torch.zeros(4)}, "unexpected discriminator.weight"),
        ({"conv1.bias": torch.zeros(3)}, r"quant_conv.bias is \[3\]"),
        ({"decoder.conv1.weight": torch.zeros(16, 16, 3, 3, 1)}, r"conv_in.weight is \[16, 16, 3"),
        ({"conv1.bias": torch.zeros(32, dtype=torch.int64)}, "quant_conv.bias is I64, expected"),
    ],
)
def test_a_file_of_another_model_is_refused(
    tmp_path: Path, changes: dict[str, Tensor | None], message: str
) -> None:
    state = {**state_of("Wan2.1"), **changes}
    torch.save({n: t for n, t in state.items() if t is not None}, tmp_path / "VAE.pth")
    with pytest.raises(WanExportError, match=message) as raised:
        open_vae_checkpoint(tmp_path / "VAE.pth")
    assert "\n" not in str(raised.value)


def test_values_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    state = state_of("Wan2.1")
    state["conv1.bias"][0] = float("nan")
    torch.save(state, tmp_path / "VAE.pth")
    with pytest.raises(WanExportError, match=r"conv1\.bias has 1 NaN"):
        written(tmp_path / "VAE.pth", tmp_path)
    assert not (tmp_path / "vae.safetensors").exists()


def test_a_cut_or_missing_file_is_one_line(files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "cut.pth").write_bytes(files["Wan2.1"].read_bytes()[:5000])
    for name in ("cut.pth", "none.pth"):
        with pytest.raises(WanExportError, match=name) as raised:
            open_vae_checkpoint(tmp_path / name)
        assert "\n" not in str(raised.value)
