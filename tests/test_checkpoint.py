"""Checkpoints of every layout give the same weights file; damaged ones are refused by name."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.wan_reference import (
    VARIANTS,
    diffusers_model,
    official_key,
    official_state,
    small_config,
    write_diffusers,
    write_official,
)
from wanexport.graphs.checkpoint import (
    CheckpointWeights,
    RandomWeights,
    diffusers_name,
    official_name,
    open_checkpoint,
    weights_layout,
    write_weights,
)
from wanexport.graphs.config import PRESETS, WanConfig, variant
from wanexport.graphs.model import parameter_shapes
from wanexport.runtime.errors import WanExportError


def convert(folder: Path, output: Path, dtype: str = "fp32") -> bytes:
    checkpoint = open_checkpoint(folder)
    weights = CheckpointWeights(checkpoint.tensors[""])
    write_weights(output, checkpoint.config, dtype, weights)
    return output.read_bytes()


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return official_state(diffusers_model(small_config("t2v-1.3b")))


@pytest.fixture
def config() -> WanConfig:
    return small_config("t2v-1.3b")


@pytest.mark.parametrize("preset", VARIANTS)
def test_both_layouts_are_recognised_and_convert_alike(preset: str, tmp_path: Path) -> None:
    config = small_config(preset)
    model = diffusers_model(config)
    official = write_official(tmp_path / "official", official_state(model), config)
    diffusers = write_diffusers(tmp_path / "diffusers", model)
    assert open_checkpoint(official).config == config
    assert open_checkpoint(diffusers).config == config
    assert open_checkpoint(diffusers).layout == "diffusers"
    assert convert(official, tmp_path / "a") == convert(diffusers, tmp_path / "b")


@pytest.mark.parametrize("preset", ["i2v-14b", "flf2v-14b"])
def test_the_key_table_is_the_official_conversion(preset: str) -> None:
    config = small_config(preset)
    for name in diffusers_model(config).state_dict():
        assert official_name(name) == official_key(name)
        assert diffusers_name(official_key(name)) == name


def test_shards_with_an_index_and_a_prefix_convert_alike(
    state: dict[str, Tensor], config: WanConfig, tmp_path: Path
) -> None:
    whole = convert(write_official(tmp_path / "whole", state, config), tmp_path / "a")
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    names = sorted(state)
    files = [f"diffusion_pytorch_model-0000{k}-of-00003.safetensors" for k in (1, 2, 3)]
    for k, file in enumerate(files):
        part = {f"model.diffusion_model.{n}": state[n] for n in names[k::3]}
        save_file(part, sharded / file)
    assert convert(sharded, tmp_path / "b") == whole  # by their names, without an index
    weight_map = {f"model.diffusion_model.{n}": files[i % 3] for i, n in enumerate(names)}
    index = sharded / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    assert convert(sharded, tmp_path / "c") == whole
    (sharded / files[1]).unlink()
    with pytest.raises(WanExportError, match=f"lacks {files[1]}"):
        open_checkpoint(sharded)


def test_a_single_file_needs_no_config(
    state: dict[str, Tensor], config: WanConfig, tmp_path: Path
) -> None:
    save_file(state, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path / "model.safetensors").config == config
    assert open_checkpoint(tmp_path).config == config


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_every_dtype_is_cast_once_by_the_policy(
    source: torch.dtype, dtype: str, state: dict[str, Tensor], config: WanConfig, tmp_path: Path
) -> None:
    stored = {name: tensor.to(source) for name, tensor in state.items()}
    convert(write_official(tmp_path / "in", stored, config), tmp_path / "out", dtype)
    target = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    written = load_file(tmp_path / "out")
    for name in ("patch_embedding.weight", "blocks.1.ffn.2.bias", "text_embedding.2.weight"):
        torch.testing.assert_close(written[name], stored[name].to(target), atol=0, rtol=0)
    for name in ("time_projection.1.weight", "blocks.0.modulation", "blocks.1.norm3.bias"):
        torch.testing.assert_close(written[name], stored[name].float(), atol=0, rtol=0)


@pytest.mark.parametrize("names", [("high_noise_model", "low_noise_model"), None])
def test_two_experts_of_either_layout(names: tuple[str, str] | None, tmp_path: Path) -> None:
    config = small_config("t2v-a14b")
    high, low = diffusers_model(config, 1), diffusers_model(config, 2)
    if names:
        for name, model in zip(names, (high, low)):
            write_official(tmp_path / name, official_state(model), config)
    else:
        write_diffusers(tmp_path, high, boundary_ratio=0.8)
        low.save_pretrained(tmp_path / "transformer_2")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.experts == ("high_noise", "low_noise")
    assert checkpoint.boundary == (None if names else 0.8)
    for expert, model in (("high_noise", high), ("low_noise", low)):
        weights = CheckpointWeights(checkpoint.tensors[expert])
        write_weights(tmp_path / "x.safetensors", config, "fp32", weights)
        written = load_file(tmp_path / "x.safetensors")
        torch.testing.assert_close(
            written["head.head.weight"], model.proj_out.weight.data, atol=0, rtol=0
        )


def test_experts_of_different_size_are_refused(tmp_path: Path) -> None:
    for name, layers in (("high_noise_model", 1), ("low_noise_model", 2)):
        config = small_config("t2v-a14b", layers)
        write_official(tmp_path / name, official_state(diffusers_model(config)), config)
    with pytest.raises(WanExportError, match="differ in size"):
        open_checkpoint(tmp_path)


def test_presets_are_known_by_their_config() -> None:
    for name, preset in PRESETS.items():
        expected = "t2v-14b" if name == "t2v-14b" else name
        assert variant(preset.config, preset.experts) == expected
    assert variant(small_config("flf2v-14b"), ()) == "flf2v"


def broken(state: dict[str, Tensor], **changes: Any) -> dict[str, Tensor]:
    changed = {name.replace("__", "."): value for name, value in changes.items()}
    return {n: t for n, t in {**state, **changed}.items() if t is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks__1__ffn__2__bias": None}, r"missing blocks\.1\.ffn\.2\.bias"),
        ({"vace__weight": torch.zeros(2)}, r"unexpected vace\.weight"),
        ({"head__head__bias": torch.zeros(3)}, r"head\.head\.bias is \[3\], expected \[64\]"),
        ({"blocks__0__modulation": torch.zeros(1, 6, 256).double()}, r"is F64, expected F32"),
        ({"patch_embedding__weight": None}, r"no patch_embedding\.weight of rank 5"),
        ({"patch_embedding__weight": torch.zeros(256, 17, 1, 2, 2)}, "no Wan has 17 input"),
    ],
)
def test_wrong_tensors_are_named(
    changes: dict[str, Any],
    message: str,
    state: dict[str, Tensor],
    config: WanConfig,
    tmp_path: Path,
) -> None:
    write_official(tmp_path, broken(state, **changes), config)
    with pytest.raises(WanExportError, match=message):
        open_checkpoint(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WanExportError, match="is no Wan checkpoint"):
        open_checkpoint(tmp_path)


def test_values_beyond_fp16_are_refused(
    state: dict[str, Tensor], config: WanConfig, tmp_path: Path
) -> None:
    large = broken(state, text_embedding__0__bias=torch.full((256,), 1e5))
    folder = write_official(tmp_path / "in", large, config)
    with pytest.raises(WanExportError, match=r"text_embedding\.0\.bias has values beyond fp16"):
        convert(folder, tmp_path / "out", "fp16")
    assert not (tmp_path / "out").exists()


def test_the_digest_follows_the_content_not_the_files(
    state: dict[str, Tensor], config: WanConfig, tmp_path: Path
) -> None:
    def digest(folder: Path) -> str:
        return CheckpointWeights(open_checkpoint(folder).tensors[""]).digest()

    one = digest(write_official(tmp_path / "a", state, config))
    assert digest(write_official(tmp_path / "b", state, config)) == one
    changed = broken(state, head__head__bias=state["head.head.bias"] * 1.01)
    assert digest(write_official(tmp_path / "c", changed, config)) != one


def test_random_weights_depend_on_seed_and_expert_alone(tmp_path: Path) -> None:
    config = small_config("t2v-1.3b")

    def content(seed: int, expert: str, used: WanConfig = config) -> bytes:
        path = tmp_path / "x"
        write_weights(path, used, "fp32", RandomWeights(used, seed, expert))
        return path.read_bytes()

    assert content(0, "") == content(0, "")
    assert content(0, "") != content(1, "")
    assert content(0, "high_noise") != content(0, "low_noise")
    tensors = load_file(tmp_path / "x")
    content(0, "low_noise", replace(config, num_layers=1))
    fewer = load_file(tmp_path / "x")
    torch.testing.assert_close(fewer["head.head.weight"], tensors["head.head.weight"])


def test_random_weights_have_the_stated_spread() -> None:
    config = small_config("t2v-1.3b")
    source = RandomWeights(config, 0, "")
    matrix = torch.cat(list(source.chunks("text_embedding.0.weight")))
    assert matrix.std().item() == pytest.approx(4096**-0.5, rel=0.01)
    assert abs(matrix.mean().item()) < 1e-3
    norm = torch.cat(list(source.chunks("blocks.0.norm3.weight")))
    assert norm.mean().item() == pytest.approx(1, abs=0.03)


def test_experts_share_one_header() -> None:
    header, entries = weights_layout(small_config("t2v-a14b"), "bf16")
    assert header == weights_layout(small_config("t2v-1.3b"), "bf16")[0]
    assert set(entries) == set(parameter_shapes(small_config("t2v-a14b")))
