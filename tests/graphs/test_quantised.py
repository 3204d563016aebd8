"""Quantised checkpoints are read as what their writers mean, or refused by the format's name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.oracles.quantised_files import (
    by_block,
    by_row,
    is_of_block,
    quantise,
    write_comfy,
    write_scaled,
)
from tests.oracles.wan_reference import diffusers_model, official_key, small_config
from wanexport.graphs import source_tensor
from wanexport.graphs.checkpoint import Checkpoint, open_checkpoint
from wanexport.graphs.weights import CheckpointWeights, read_tensor, write_weights
from wanexport.runtime.bundle.tensorfile import load_arrays
from wanexport.runtime.errors import BadRequest, WanExportError
from wanexport.runtime.wan_config import WanConfig

E4M3, E5M2, INT8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.int8
Q = "blocks.0.self_attn.q"
COMFY = "model.diffusion_model."


def values_of(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """Every tensor as it is read, in fp32."""
    return {name: read_tensor(t).float().numpy() for name, t in checkpoint.tensors[""].items()}


def check(path: Path, expected: dict[str, np.ndarray], stored: str, config: WanConfig) -> None:
    """What is read is bit-equal to the values, whole and when it is converted."""
    checkpoint = open_checkpoint(path)
    assert (checkpoint.config, checkpoint.stored) == (config, stored)
    found = values_of(checkpoint)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values.reshape(found[name].shape), name)
    for dtype in ("fp32", "bf16"):
        written = path.parent / f"{dtype}.converted"
        write_weights(written, config, dtype, CheckpointWeights(checkpoint.tensors[""]))
        rounded = torch.float32 if dtype == "fp32" else torch.bfloat16
        weight = torch.from_numpy(expected[f"{Q}.weight"]).to(rounded).float().numpy()
        np.testing.assert_array_equal(load_arrays(written)[f"{Q}.weight"], weight)
        written.unlink()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix takes several, of whole rows."""
    monkeypatch.setattr(source_tensor, "CHUNK", 7 * 1024)


MARKER = {"scaled_fp8": torch.zeros(0, dtype=E4M3)}
SCALED: dict[str, tuple[str, dict[str, Any]]] = {
    "Comfy-Org": (
        "F16, 43 tensors; fp8 e4m3, one scale a tensor, 26 tensors",
        {"extra": MARKER},
    ),
    "Comfy-Org, prefix": (
        "F16, 43 tensors; fp8 e4m3, one scale a tensor, 26 tensors",
        {"extra": {COMFY + "scaled_fp8": MARKER["scaled_fp8"]}, "prefix": COMFY},
    ),
    "e5m2": ("F16, 43 tensors; fp8 e5m2, one scale a tensor, 26 tensors", {"dtype": E5M2}),
    "Kijai, without a marker": (
        "BF16, 49 tensors; fp8 e4m3, one scale a tensor, 20 tensors",
        {"chosen": is_of_block, "rest": torch.bfloat16},
    ),
    "LightX2V for ComfyUI": (
        "BF16, 49 tensors; fp8 e4m3, one scale a tensor, 20 tensors",
        {
            "chosen": is_of_block,
            "rest": torch.bfloat16,
            "extra": {"scaled_fp8": torch.zeros(2, dtype=E4M3)},
            "prefix": "diffusion_model.",
        },
    ),
    "LightX2V fp8": (
        "BF16, 49 tensors; fp8 e4m3, one scale a row, 20 tensors",
        {
            "chosen": is_of_block,
            "rest": torch.bfloat16,
            "scale": by_row,
            "names": ("weight_scale", "input_scale"),
        },
    ),
    "LightX2V int8": (
        "F32, 49 tensors; int8, one scale a row, 20 tensors",
        {
            "dtype": INT8,
            "chosen": is_of_block,
            "rest": torch.float32,
            "scale": by_row,
            "names": ("weight_scale", "input_scale"),
        },
    ),
    "musubi": (
        "F16, 49 tensors; fp8 e4m3, one scale a block of 64, 20 tensors",
        {"chosen": is_of_block, "scale": by_block},
    ),
    "musubi, one scale": (
        "F16, 49 tensors; fp8 e4m3, one scale a tensor, 20 tensors",
        {"chosen": is_of_block, "scale": lambda weight: (1,)},
    ),
}


@pytest.mark.parametrize("name", SCALED)
def test_scaled_files_are_read_to_the_bit(
    name: str, state: dict[str, Tensor], config: WanConfig, tmp_path: Path
) -> None:
    stored, options = SCALED[name]
    path = tmp_path / "wan.safetensors"
    check(path, write_scaled(path, state, **options), stored, config)


@pytest.mark.parametrize("prefix", ["", COMFY])
@pytest.mark.parametrize("is_tensor", [True, False])
def test_comfyui_says_of_each_layer_what_it_is(
    is_tensor: bool, prefix: str, state: dict[str, Tensor], config: WanConfig, tmp_path: Path
) -> None:
    path = tmp_path / "wan.safetensors"
    values = write_comfy(path, state, is_tensor=is_tensor, prefix=prefix)
    checkpoint = open_checkpoint(path)
    found = values_of(checkpoint)
    for name, expected in values.items():
        np.testing.assert_array_equal(found[name], expected, name)
    assert all(what in checkpoint.stored for what in ("fp8 e4m3", "fp8 e5m2", "int8", "BF16"))
    assert checkpoint.config == config


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_a_plain_cast_is_its_values(
    dtype: torch.dtype, state: dict[str, Tensor], config: WanConfig, tmp_path: Path
) -> None:
    kept = {n: t.to(dtype) if is_of_block(n, t) else t.bfloat16() for n, t in state.items()}
    save_file(kept, tmp_path / "wan.safetensors")
    called = {E4M3: "fp8 e4m3", E5M2: "fp8 e5m2"}[dtype]
    check(
        tmp_path / "wan.safetensors",
        {name: tensor.float().numpy() for name, tensor in kept.items()},
        f"BF16, 49 tensors; {called}, no scales, 20 tensors",
        config,
    )


MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8", "config_groups": {}, "ignore": ["x"]}


def write_modelopt(folder: Path, config: WanConfig, stated: Any = MODELOPT) -> dict[str, Any]:
    """A folder as ModelOpt exports it: diffusers' names, two shards, scales beside weights."""
    state = diffusers_model(config).state_dict()
    tensors, values = {}, {}
    for name, weight in state.items():
        if not name.startswith("blocks.1.") or not name.endswith(".weight") or weight.dim() != 2:
            tensors[name] = weight.bfloat16().contiguous()
            values[official_key(name)] = tensors[name].float().numpy()
            continue
        made = quantise(weight, E4M3, ())
        layer = name.removesuffix("weight")
        tensors |= {name: made.stored, layer + "weight_scale": made.scale}
        tensors[layer + "input_scale"] = torch.ones(())
        values[official_key(name)] = made.values
    folder.mkdir(parents=True)
    names = sorted(tensors)
    stem = "diffusion_pytorch_model"
    files = [f"{stem}-0000{k}-of-00002.safetensors" for k in (1, 2)]
    listed = {name: files[k % 2] for k, name in enumerate(names)}  # a scale apart from its weight
    for file in files:
        own = {name: tensors[name] for name in names if listed[name] == file}
        save_file(own, folder / file)
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    told = {"_class_name": "WanTransformer3DModel", "quantization_config": stated}
    (folder / "config.json").write_text(json.dumps(told))
    return values


def test_a_folder_of_modelopt_is_read(config: WanConfig, tmp_path: Path) -> None:
    values = write_modelopt(tmp_path / "transformer", config)
    stored = "BF16, 59 tensors; fp8 e4m3, one scale a tensor, 10 tensors"
    check(tmp_path, values, stored, config)


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "'modelopt' 'NVFP4', which is not"),
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes' 'FP8', which is not read"),
        ("fp8", "None 'FP8', which is not read"),
    ],
)
def test_other_methods_of_a_config_are_refused(
    stated: Any, message: str, config: WanConfig, tmp_path: Path
) -> None:
    write_modelopt(tmp_path / "transformer", config, stated)
    with pytest.raises(BadRequest, match=message):
        open_checkpoint(tmp_path)


def test_a_config_that_tells_of_quantisation_which_no_tensor_has_is_refused(
    state: dict[str, Tensor], tmp_path: Path
) -> None:
    save_file(state, tmp_path / "wan.safetensors")
    told = {"_class_name": "WanModel", "quantization_config": MODELOPT}
    (tmp_path / "config.json").write_text(json.dumps(told))
    with pytest.raises(BadRequest, match="but no tensor beside it is quantised"):
        open_checkpoint(tmp_path)


def test_lightx2v_shards_by_block_with_an_index(
    state: dict[str, Tensor], config: WanConfig, tmp_path: Path
) -> None:
    whole = tmp_path / "whole.safetensors"
    names = ("weight_scale", "input_scale")
    values = write_scaled(whole, state, chosen=is_of_block, scale=by_row, names=names)
    tensors, folder = load_file(whole), tmp_path / "model"
    folder.mkdir()
    listed = {}
    for name in tensors:
        block = name.split(".")[1] if name.startswith("blocks.") else ""
        listed[name] = f"block_{block}.safetensors" if block else "non_block.safetensors"
    for file in set(listed.values()):
        save_file({n: tensors[n] for n in tensors if listed[n] == file}, folder / file)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": listed}))
    stored = "F16, 49 tensors; fp8 e4m3, one scale a row, 20 tensors"
    check(folder, values, stored, config)


def told(**fields: Any) -> Tensor:
    """What a layer's `comfy_quant` holds."""
    return torch.from_numpy(np.frombuffer(json.dumps(fields).encode(), np.uint8).copy())


def fp8(tensors: dict[str, Tensor]) -> Tensor:
    """Make a weight fp8, and return it."""
    tensors[f"{Q}.weight"] = tensors[f"{Q}.weight"].to(E4M3)
    return tensors[f"{Q}.weight"]


Change = Callable[[dict[str, Tensor]], object]
REFUSED: dict[str, tuple[str, Change]] = {
    "nvfp4": (
        "is quantised to nvfp4, which is not read: take",
        lambda t: t.update({f"{Q}.weight_scale_2": torch.ones(())}),
    ),
    "mxfp8 scales": (
        "is quantised to mxfp8",
        lambda t: (fp8(t), t.update({f"{Q}.weight_scale": torch.ones(256, 8).byte()})),
    ),
    "mxfp8 told": (
        "is quantised to mxfp8",
        lambda t: (fp8(t), t.update({f"{Q}.comfy_quant": told(format="mxfp8")})),
    ),
    "convrot": (
        "int8_tensorwise with convrot, which is not read",
        lambda t: t.update({f"{Q}.comfy_quant": told(format="int8_tensorwise", convrot=True)}),
    ),
    "convrot under params": (
        "float8_e4m3fn with convrot, which is not read",
        lambda t: t.update(
            {f"{Q}.comfy_quant": told(format="float8_e4m3fn", params={"convrot": True})}
        ),
    ),
    "w4a16": (
        "is quantised to awq_w4a16",
        lambda t: t.update({f"{Q}.comfy_quant": told(format="awq_w4a16")}),
    ),
    "blockwise int8": (
        "is quantised to int8_blockwise",
        lambda t: t.update({f"{Q}.comfy_quant": told(format="int8_blockwise")}),
    ),
    "nunchaku": (
        "is quantised to nunchaku",
        lambda t: t.update({f"{Q}.wscales": torch.ones(2), f"{Q}.lora_down": torch.ones(2)}),
    ),
    "quanto": (
        r"is quantised to int8 or fp8 \(quanto\)",
        lambda t: t.update(
            {f"{Q}.weight._data": torch.ones(2), f"{Q}.weight._scale": torch.ones(2)}
        ),
    ),
    "bitsandbytes": (
        r"is quantised to 4 or 8 bits \(bitsandbytes\)",
        lambda t: t.update({f"{Q}.weight.absmax": torch.ones(1)}),
    ),
    "4 bits": (
        "is quantised to 4 bits",
        lambda t: t.update({f"{Q}.weight": torch.ones(256, 128).byte()}),
    ),
    "DeepSeek's blocks": (
        r"fp8 in square blocks \(weight_scale_inv\)",
        lambda t: (fp8(t), t.update({f"{Q}.weight_scale_inv": torch.ones(2, 2)})),
    ),
    "a config that is no JSON": (
        r"self_attn\.q\.comfy_quant in .* cannot be read",
        lambda t: t.update({f"{Q}.comfy_quant": torch.full((9,), 7, dtype=torch.uint8)}),
    ),
    "a config that is too long": (
        "comfy_quant of .* is no JSON text",
        lambda t: t.update({f"{Q}.comfy_quant": torch.zeros(5000, dtype=torch.uint8)}),
    ),
    "a config of a weight in bf16": (
        r"says that blocks\.0\.self_attn\.q is float8_e4m3fn, but its weight is F32",
        lambda t: t.update({f"{Q}.comfy_quant": told(format="float8_e4m3fn")}),
    ),
    "a config of nothing": (
        r"says that other is float8_e4m3fn, but its weight is not there",
        lambda t: t.update({"other.comfy_quant": told(format="float8_e4m3fn")}),
    ),
    "a marker without scales": (
        r"q\.weight of .* is fp8 e4m3 without its scale: expected .*self_attn\.q\.weight_s",
        lambda t: (fp8(t), t.update(MARKER)),
    ),
    "one scale missing": (
        r"ffn\.0\.weight of .* is fp8 e4m3 without its scale",
        lambda t: (
            fp8(t),
            t.update({f"{Q}.scale_weight": torch.ones(())}),
            t.update({"blocks.0.ffn.0.weight": t["blocks.0.ffn.0.weight"].to(E4M3)}),
        ),
    ),
    "int8 without scales": (
        r"q\.weight of .* is int8 without its scale",
        lambda t: t.update({f"{Q}.weight": torch.ones(256, 256, dtype=INT8)}),
    ),
    "two scales": (
        "has two scales, .*scale_weight and .*weight_scale",
        lambda t: (
            fp8(t),
            t.update({f"{Q}.scale_weight": torch.ones(()), f"{Q}.weight_scale": torch.ones(())}),
        ),
    ),
    "a scale of another shape": (
        r"is \[255, 1\], the weight .* \[256, 256\]: expected one scale, one a row",
        lambda t: (fp8(t), t.update({f"{Q}.scale_weight": torch.ones(255, 1)})),
    ),
    "a scale of no blocks": (
        r"is \[256, 3, 1\], the weight",
        lambda t: (fp8(t), t.update({f"{Q}.scale_weight": torch.ones(256, 3, 1)})),
    ),
    "a scale in int": (
        "a format with scales of I32",
        lambda t: (fp8(t), t.update({f"{Q}.scale_weight": torch.ones((), dtype=torch.int32)})),
    ),
    "a scale of a weight that is none": (
        r"unexpected blocks\.0\.self_attn\.q\.scale_weight",
        lambda t: t.update({f"{Q}.scale_weight": torch.ones(())}),
    ),
    "a scale of nothing": (
        r"unexpected blocks\.9q\.scale_weight|unexpected blocks\.0\.z\.scale_weight",
        lambda t: t.update({"blocks.0.z.scale_weight": torch.ones(())}),
    ),
    "another fp8": (
        r"is quantised to fp8 \(e4m3fnuz\)",
        lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"].to(torch.float8_e4m3fnuz)}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_read_is_refused_by_name(
    what: str, state: dict[str, Tensor], tmp_path: Path
) -> None:
    message, change = REFUSED[what]
    tensors = dict(state)
    change(tensors)
    save_file(tensors, tmp_path / "wan.safetensors")
    with pytest.raises(BadRequest, match=message) as refused:
        open_checkpoint(tmp_path / "wan.safetensors")
    assert "\n" not in str(refused.value) and str(tmp_path / "wan.safetensors") in str(
        refused.value
    )


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_no_factor_is_refused(
    scale: float, state: dict[str, Tensor], config: WanConfig, tmp_path: Path
) -> None:
    factors = torch.ones(256, 1)
    factors[200] = scale
    tensors = {**state, f"{Q}.scale_weight": factors}
    fp8(tensors)
    save_file(tensors, tmp_path / "wan.safetensors")
    weights = CheckpointWeights(open_checkpoint(tmp_path / "wan.safetensors").tensors[""])
    with pytest.raises(BadRequest, match=r"q\.scale_weight, the scale of .* NaN, infinite, zero"):
        write_weights(tmp_path / "out", config, "fp32", weights)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("metadata", ["{", "[]", '{"layers": []}', '{"layers": {"x": 3}}'])
def test_a_damaged_description_in_the_header_is_refused(
    metadata: str, state: dict[str, Tensor], tmp_path: Path
) -> None:
    save_file(state, tmp_path / "wan.safetensors", {"_quantization_metadata": metadata})
    with pytest.raises(WanExportError, match="_quantization_metadata"):
        open_checkpoint(tmp_path / "wan.safetensors")


def test_the_digest_follows_a_scale_too(state: dict[str, Tensor], tmp_path: Path) -> None:
    def digest(scale: float) -> str:
        tensors = {**state, f"{Q}.scale_weight": torch.tensor(scale)}
        fp8(tensors)
        save_file(tensors, tmp_path / "wan.safetensors")
        return CheckpointWeights(open_checkpoint(tmp_path / "wan.safetensors").tensors[""]).digest()

    assert digest(0.5) == digest(0.5) != digest(0.25)


def test_two_experts_may_have_different_formats(state: dict[str, Tensor], tmp_path: Path) -> None:
    write_scaled(tmp_path / "a.safetensors", state, extra=MARKER)
    save_file(state, tmp_path / "b.safetensors")
    checkpoint = open_checkpoint(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert checkpoint.experts == ("high_noise", "low_noise")
    assert checkpoint.config == small_config("t2v-a14b")
    assert "fp8 e4m3, one scale a tensor, 26 tensors" in checkpoint.stored
