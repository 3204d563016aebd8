"""Checkpoints of every layout give the same weights file; damaged ones are refused by name."""

import json
import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.oracles.wan_reference import (
    VARIANTS,
    convert,
    diffusers_model,
    official_key,
    official_state,
    small_config,
    with_changes,
    write_diffusers,
    write_official,
)
from tests.quick import QUICK_PRESETS, slow_but
from wanexport.graphs.checkpoint import open_checkpoint
from wanexport.graphs.weights import CheckpointWeights, write_weights
from wanexport.runtime.errors import BadRequest, WanExportError, WanExportWarning
from wanexport.runtime.wan_config import WanConfig
from wanexport.runtime.wan_keys import official_name


@pytest.mark.parametrize("preset", slow_but(VARIANTS, "t2v-a14b", *QUICK_PRESETS))
def test_both_layouts_are_recognised_and_convert_alike(preset: str, tmp_path: Path) -> None:
    config = small_config(preset)
    model = diffusers_model(config)
    official = write_official(tmp_path / "official", official_state(model), config)
    diffusers = write_diffusers(tmp_path / "diffusers", model)
    # One expert by itself has the tensors of Wan2.1's T2V, and is taken for it.
    family = "t2v" if preset == "t2v-a14b" else config.family
    assert open_checkpoint(official).config == replace(config, family=family)
    assert open_checkpoint(diffusers).config == replace(config, family=family)
    assert open_checkpoint(diffusers).layout == "diffusers"
    assert convert(official, tmp_path / "a") == convert(diffusers, tmp_path / "b")


@pytest.mark.parametrize("preset", ["i2v-14b", "flf2v-14b"])
def test_the_key_table_is_the_official_conversion(preset: str) -> None:
    config = small_config(preset)
    for name in diffusers_model(config).state_dict():
        assert official_name(name) == official_key(name)


INDEX = "diffusion_pytorch_model.safetensors.index.json"


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
    with pytest.raises(BadRequest, match=f"lacks {files[1]}"):
        open_checkpoint(sharded)


def test_a_single_file_needs_no_config(
    state: dict[str, Tensor], config: WanConfig, tmp_path: Path
) -> None:
    save_file(state, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path / "model.safetensors").config == config
    assert open_checkpoint(tmp_path).config == config


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
    with pytest.raises(BadRequest, match="differ in size"):
        open_checkpoint(tmp_path)


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
    write_official(tmp_path, with_changes(state, **changes), config)
    with pytest.raises(WanExportError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("stray", ["20000", "1000000000000", "3"])
def test_blocks_with_gaps_are_refused_at_once(
    stray: str, state: dict[str, Tensor], config: WanConfig, tmp_path: Path
) -> None:
    write_official(tmp_path, {**state, f"blocks.{stray}.x": torch.zeros(0)}, config)
    with pytest.raises(BadRequest, match=r"but not all|unexpected blocks\.1000000000000\.x"):
        open_checkpoint(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="is no Wan checkpoint"):
        open_checkpoint(tmp_path)


def test_one_tensor_in_two_files_is_refused(
    state: dict[str, Tensor], config: WanConfig, tmp_path: Path
) -> None:
    for name in ("highly", "lowly"):
        save_file(state, tmp_path / f"{name}.safetensors")
    with pytest.raises(BadRequest, match=r"is in .*highly.* and in .*lowly.*: pass -m one of"):
        open_checkpoint(tmp_path)
    assert open_checkpoint(tmp_path / "lowly.safetensors").config == config


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", '{"num_heads": "2"}', "num_heads '2': expected from 1 to 256"),
        ("config.json", '{"num_heads": true}', "num_heads True: expected from 1 to 256"),
        ("config.json", '{"text_len": "512"}', "text_len '512': expected from 1 to 8192"),
        ("config.json", '{"text_len": 0}', "text_len 0: expected from 1 to 8192"),
        ("config.json", '{"text_len": 77.5}', "text_len 77.5: expected from 1 to 8192"),
        ("config.json", '{"eps": "1e-6"}', "eps '1e-6': expected a number from 0 to 1"),
        ("config.json", '{"eps": -1e-6}', "eps -1e-06: expected a number from 0 to 1"),
        ("config.json", '{"eps": Infinity}', "eps inf: expected a number from 0 to 1"),
        ("config.json", "[" * 100_000, r"cannot read .*config\.json"),
        ("config.json", '{"num_heads": 64}', "heads of even width over 4"),
        ("config.json", "{", r"cannot read .*config\.json"),
        (
            "model_index.json",
            '{"boundary_ratio": "0.9"}',
            "boundary_ratio '0.9': expected one from",
        ),
        ("model_index.json", '{"boundary_ratio": NaN}', "boundary_ratio nan: expected one from"),
        ("model_index.json", '{"boundary_ratio": 7.5}', "boundary_ratio 7.5: expected one from"),
        ("config.json", "[]", r"cannot read .*config\.json: it is a list, expected an object"),
        ("config.json", "null", "it is null, expected an object"),
        ("config.json", '"x"', "it is a text, expected an object"),
        ("config.json", "7", "it is a number, expected an object"),
        ("config.json", '{"a":' + "[" * 500 + "]" * 500 + "}", "states a, which no Wan known here"),
        ("config.json", '{"num_heads": 1' + "0" * 400 + "}", "num_heads 1000.*: expected from 1"),
        ("config.json", '{"num_heads": 1' + "0" * 5000 + "}", r"cannot read .*config\.json"),
        (
            "config.json",
            '{"num_heads": [[[[2]]]]}',
            r"num_heads \[\[\[\[2\]\]\]\]: expected",
        ),
        ("config.json", '{"num_heads": 2, "num_heads": 4}', "it has a name twice"),
        ("config.json", "\udcff", r"cannot read .*config\.json \('utf-8' codec can't"),
        ("config.json", " " * (8 << 20) + "{}", r"config\.json is larger than 8388608 bytes"),
        ("model_index.json", "[1]", r"model_index\.json: it is a list, expected an object"),
        (INDEX, "[]", r"index\.json: it is a list, expected an object"),
        (INDEX, '{"weight_map": {"a\\n": "x\\n"}}', r"lacks x\\n, which its index lists"),
        (INDEX, '{"weight_map": 3}', "no weight_map"),
        (INDEX, '{"weight_map": {"a": 5, "b": "x"}}', "names what are no files"),
        (INDEX, '{"weight_map": {"a": "/etc/passwd"}}', "names what are no files"),
    ],
)
def test_damaged_json_is_refused(
    file: str,
    content: str,
    message: str,
    state: dict[str, Tensor],
    config: WanConfig,
    tmp_path: Path,
) -> None:
    write_official(tmp_path, state, config)
    (tmp_path / file).write_text(content, errors="surrogateescape")
    with warnings.catch_warnings(), pytest.raises(Exception, match=message) as refused:
        warnings.simplefilter("error", WanExportWarning)
        open_checkpoint(tmp_path)
    assert isinstance(refused.value, WanExportError | WanExportWarning)
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 500 + len(str(tmp_path))


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
@pytest.mark.parametrize("name", ["config.json", "model_index.json", INDEX, "wan.safetensors"])
def test_only_regular_files_of_a_checkpoint_are_read(
    kind: str, name: str, state: dict[str, Tensor], tmp_path: Path
) -> None:
    if name != "wan.safetensors":
        save_file(state, tmp_path / "x.safetensors")
    path = tmp_path / name
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(WanExportError, match=rf"{path} is no regular file"):
        open_checkpoint(tmp_path)


def test_what_may_not_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr(os, "open", forbidden)
    for path in (tmp_path, tmp_path / "x.safetensors"):
        with pytest.raises(BadRequest, match=rf"^cannot read {path}.*: Permission denied"):
            open_checkpoint(path)
    monkeypatch.undo()
    monkeypatch.setattr(os, "listdir", forbidden)
    with pytest.raises(BadRequest, match=rf"^cannot read {tmp_path}: Permission denied"):
        open_checkpoint(tmp_path)


def shards(folder: Path, state: dict[str, Tensor], count: int = 2) -> list[str]:
    """The tensors in numbered shards with an index; the names of the shards."""
    names = [f"diffusion_pytorch_model-{k + 1:05}-of-{count:05}.safetensors" for k in range(count)]
    listed = {name: names[k % count] for k, name in enumerate(sorted(state))}
    for file in names:
        save_file({n: state[n] for n, place in listed.items() if place == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": listed}))
    return names


def test_an_index_and_its_files_list_the_same_tensors(
    state: dict[str, Tensor], tmp_path: Path
) -> None:
    first, second = shards(tmp_path, state)
    open_checkpoint(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    for changed, message in (
        ({"extra.weight": first}, rf"{first} lacks what its index lists \(extra\.weight\)"),
        (
            {"head.modulation": second},
            r"(has|lacks) what its index .* \(head\.modulation\)",
        ),
    ):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": index["weight_map"] | changed}))
        with pytest.raises(BadRequest, match=message):
            open_checkpoint(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps(index))
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(BadRequest, match=r"has diffusion_pytorch_model\.safetensors, which"):
        open_checkpoint(tmp_path)


def test_a_shard_alone_and_a_set_with_gaps_are_refused(
    state: dict[str, Tensor], tmp_path: Path
) -> None:
    names = shards(tmp_path, state, 3)
    with pytest.raises(BadRequest, match="is one of 3 shards: pass -m its folder"):
        open_checkpoint(tmp_path / names[0])
    (tmp_path / INDEX).unlink()
    (tmp_path / names[2]).unlink()
    with pytest.raises(BadRequest, match=rf"lacks {names[2]} of 3 shards"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(("channels", "whose"), [(48, "Wan-Fun-Control"), (52, "Wan2.2-Fun-Contr")])
def test_a_wan_with_other_inputs_is_named(
    channels: int, whose: str, state: dict[str, Tensor], config: WanConfig, tmp_path: Path
) -> None:
    wide = torch.zeros(256, channels, 1, 2, 2)
    write_official(tmp_path, with_changes(state, patch_embedding__weight=wide), config)
    with pytest.raises(BadRequest, match=f"is of {whose}.*, which is not read yet: take"):
        open_checkpoint(tmp_path)
