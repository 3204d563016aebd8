"""One expert of an A14B is known by its name, and built by itself only when that is asked for."""

from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import Tensor

from tests.oracles.wan_reference import diffusers_model, official_state, small_config
from wanexport.exporter.build import build
from wanexport.exporter.model_source import resolve
from wanexport.graphs.checkpoint import open_checkpoint
from wanexport.graphs.experts import expert_of_name
from wanexport.runtime.errors import BadRequest, WanExportError
from wanexport.runtime.wan_config import WanConfig


@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("wan2.2_t2v_high_noise_14B_fp8_scaled", "high_noise"),
        ("wan2.2_i2v_low_noise_14B_fp16", "low_noise"),
        ("Wan2_2-T2V-A14B_HIGH_fp8_e4m3fn_scaled_KJ", "high_noise"),
        ("Wan2_2-T2V-A14B-LOW_bf16", "low_noise"),
        ("Wan2.2-I2V-A14B-HighNoise-Q4_K_M", "high_noise"),
        ("Wan22I2VLowNoise", "low_noise"),
        ("wan22_i2v_high", "high_noise"),
        ("wan2.2-lownoise", "low_noise"),
        ("low-noise", "low_noise"),
        ("wan.low.noise", "low_noise"),
        ("high_noise_model", "high_noise"),
        ("wan2.1_t2v_1.3B", ""),
        ("wan_high_quality", ""),
        ("wan_low_vram", ""),
        ("wan_lowres", ""),
        ("slow_motion", ""),
        ("highlander", ""),
        ("wan_high_low_merged", ""),
    ],
)
def test_names_tell_the_expert(name: str, expert: str) -> None:
    assert expert_of_name(f"{name}.safetensors") == expert_of_name(name) == expert


@pytest.mark.parametrize(
    ("place", "model"),
    [
        ("wan_low_noise_14B.safetensors", "wan_low_noise_14B.safetensors"),
        ("only/Wan2_2-T2V-A14B_HIGH.safetensors", "only"),
        ("high_noise_model/diffusion_pytorch_model.safetensors", "high_noise_model"),
        ("low_noise_model/x.safetensors", "low_noise_model/x.safetensors"),
        ("transformer_2/diffusion_pytorch_model.safetensors", "transformer_2"),
        ("my-low-noise/diffusion_pytorch_model.safetensors", "my-low-noise"),
    ],
)
def test_one_expert_is_refused_unless_asked_for(
    place: str, model: str, state: dict[str, Tensor], config: WanConfig, tmp_path: Path
) -> None:
    (tmp_path / place).parent.mkdir(exist_ok=True)
    save_file(state, tmp_path / place)
    with pytest.raises(WanExportError, match=r"is one expert of an A14B .* or --expert-alone"):
        resolve(str(tmp_path / model), None)
    assert resolve(str(tmp_path / model), None, expert_alone=True).config == config


def test_a_link_does_not_hide_an_expert(state: dict[str, Tensor], tmp_path: Path) -> None:
    (tmp_path / "high_noise_model").mkdir()
    save_file(state, tmp_path / "high_noise_model" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "model").symlink_to("high_noise_model")
    with pytest.raises(WanExportError, match="is one expert of an A14B"):
        resolve(str(tmp_path / "model"), None)


def test_the_first_transformer_of_two_is_one_expert(
    state: dict[str, Tensor], tmp_path: Path
) -> None:
    folder = tmp_path / "transformer"
    folder.mkdir()
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    assert resolve(str(folder), None).experts == ()
    (tmp_path / "model_index.json").write_text('{"boundary_ratio": 0.875}')
    with pytest.raises(WanExportError, match=r"is one expert of an A14B .* has a second expert"):
        resolve(str(folder), None)
    with pytest.raises(BadRequest, match=r"pass -m .*/transformer with --expert-alone"):
        resolve(str(tmp_path), None)
    assert resolve(str(folder), None, expert_alone=True).experts == ()


def test_names_say_nothing_of_a_model_that_has_one_expert(tmp_path: Path) -> None:
    for preset in ("i2v-14b", "ti2v-5b"):
        tensors = official_state(diffusers_model(small_config(preset, 1)))
        save_file(tensors, tmp_path / "wan_low_noise.safetensors")
        assert open_checkpoint(tmp_path / "wan_low_noise.safetensors").alone == ""


def test_both_experts_are_told_apart_by_the_names_of_their_files(
    state: dict[str, Tensor], tmp_path: Path
) -> None:
    names = ("Wan2_2-T2V-A14B_HIGH.safetensors", "Wan2_2-T2V-A14B-LOW.safetensors")
    for name in names:
        save_file(state, tmp_path / name)
    assert resolve(str(tmp_path), None).experts == ("high_noise", "low_noise")
    for name, folder in zip(names, ("high_noise_model", "low_noise_model"), strict=True):
        (tmp_path / folder).mkdir()
        (tmp_path / name).rename(tmp_path / folder / name)
    assert resolve(str(tmp_path), None).experts == ("high_noise", "low_noise")
    with pytest.raises(WanExportError, match="has both experts: leave out --expert-alone"):
        build(tmp_path, resolution="64x96", frames=9, expert_alone=True, backends=["onnx"])


def test_an_expert_in_the_others_folder_is_refused(
    state: dict[str, Tensor], tmp_path: Path
) -> None:
    for folder in ("high_noise_model", "low_noise_model"):
        (tmp_path / folder).mkdir()
        save_file(state, tmp_path / folder / "wan_low_noise.safetensors")
    with pytest.raises(BadRequest, match="is given as the high-noise expert, and is named as"):
        open_checkpoint(tmp_path)
