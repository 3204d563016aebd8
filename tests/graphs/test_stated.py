"""What the JSON files of a checkpoint state is used, or agrees with the tensors, or is refused."""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.oracles.wan_reference import diffusers_model, official_json, small_config, write_official
from wanexport.graphs.checkpoint import open_checkpoint
from wanexport.graphs.config import PRESETS
from wanexport.graphs.stated import check_config, read_config
from wanexport.runtime.errors import BadRequest, WanExportWarning
from wanexport.runtime.wan_config import WanConfig

UMT5 = {"architectures": ["UMT5EncoderModel"], "model_type": "umt5", "d_model": 4096,
        "num_heads": 8, "num_layers": 24}  # fmt: skip
DIFFUSERS = {"_class_name": "WanTransformer3DModel", "_diffusers_version": "0.42.1"}


@pytest.mark.parametrize(
    "other",
    [
        UMT5,
        {"model_type": "umt5", "num_heads": 8},
        {"architectures": ["CLIPVisionModel"], "num_attention_heads": 16},
        {"_class_name": "AutoencoderKLWan", "num_layers": 4},
        {"_class_name": "UniPCMultistepScheduler", "text_len": 7},
        {"_class_name": "FluxTransformer2DModel", "num_attention_heads": 4},
    ],
)
def test_a_config_of_something_else_is_not_used_and_a_warning_says_so(
    other: dict[str, Any], state: dict[str, Tensor], config: WanConfig, tmp_path: Path
) -> None:
    save_file(state, tmp_path / "wan.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(other))
    for place in (tmp_path, tmp_path / "wan.safetensors"):
        with pytest.warns(WanExportWarning, match=r"config\.json is of another model .* not read"):
            assert open_checkpoint(place).config == config
    (tmp_path / "wan.safetensors").rename(tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(BadRequest, match=r"of another model .* but the tensors beside it are"):
        open_checkpoint(tmp_path)


def check(stated: dict[str, Any], config: WanConfig, folder: Path) -> None:
    """Read a config.json and hold it against the config of the tensors; warnings are errors."""
    file = folder / "config.json"
    file.write_text(json.dumps(stated))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_config(read_config(file, owned=True), config, file)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_configs_of_published_models_are_taken(preset: str, tmp_path: Path) -> None:
    config = PRESETS[preset].config
    kind = "t2v" if config.family == "self-forcing" else preset.split("-")[0]
    official = official_json(config) | {"model_type": kind}
    if preset != "tiny":
        check(official, config, tmp_path)


@pytest.mark.parametrize("preset", ["t2v-1.3b", "i2v-14b", "flf2v-14b", "i2v-a14b", "ti2v-5b"])
def test_what_diffusers_writes_is_taken(preset: str, tmp_path: Path) -> None:
    config = small_config(preset)
    stated = dict(diffusers_model(config).config)
    check(json.loads(json.dumps(stated)) | DIFFUSERS, config, tmp_path)


OFFICIAL = {"_class_name": "WanModel"}
WRONG: list[dict[str, Any]] = [
    {"dim": 512}, {"ffn_dim": 513}, {"num_layers": 3}, {"in_dim": 36}, {"in_channels": 36},
    {"out_dim": 48}, {"out_channels": 48}, {"text_dim": 16}, {"freq_dim": 128},
    {"num_heads": 4}, {"num_attention_heads": 4}, {"attention_head_dim": 64},
    {"patch_size": [1, 4, 4]}, {"patch_size": 2}, {"qk_norm": False}, {"qk_norm": "layer_norm"},
    {"cross_attn_norm": False}, {"window_size": [3, 3]},
    {"image_dim": 1280}, {"added_kv_proj_dim": 256}, {"pos_embed_seq_len": 514},
    {"model_type": "i2v"}, {"model_type": "ti2v"}, {"model_type": "umt5"}, {"model_type": 3},
    {"num_layers": True}, {"num_layers": 2.0}, {"num_layers": None}, {"dim": [256]},
    {"dim": 10**400}, {"text_len": 77}, {"eps": 1e-5},
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_what_does_not_fit_the_tensors_is_refused_with_both_values(
    wrong: dict[str, Any], config: WanConfig, tmp_path: Path
) -> None:
    ((field, value),) = wrong.items()
    with pytest.raises(BadRequest) as refused:
        check(OFFICIAL | wrong, config, tmp_path)
    message = str(refused.value)
    assert str(tmp_path / "config.json") in message and field in message and "\n" not in message
    assert str(value)[:15] in message and "but the tensors are of a Wan with" in message
    assert len(message) < 300 + len(str(tmp_path))


@pytest.mark.parametrize(
    "relative",
    [
        {"_class_name": "VaceWanModel"}, {"_class_name": "WanVACETransformer3DModel"},
        {"_class_name": "WanAnimateTransformer3DModel"}, {"_class_name": "WanModel_S2V"},
        {"_class_name": "CausalWanTransformer3DModel"}, {"_class_name": "WanModelFast"},
        {"_class_name": "SkyReelsV2Transformer3DModel"},
        {"_class_name": "Wan2_2Transformer3DModel"},
        {"_class_name": "HeliosTransformer3DModel"}, {"architectures": ["WanVACE"]},
        {"model_type": "vace"}, {"_class_name": "WanModel", "model_type": "s2v"},
        OFFICIAL | {"vace_layers": [0, 5]}, OFFICIAL | {"control_type": "cam"},
        OFFICIAL | {"add_ref_conv": True},
    ],
    ids=str,
)  # fmt: skip
def test_a_config_of_a_relative_is_refused_by_name(
    relative: dict[str, Any], config: WanConfig, tmp_path: Path
) -> None:
    with pytest.raises(BadRequest, match=r"config\.json has .*, which is not read yet; take"):
        check(relative, config, tmp_path)


CAUSAL = {"_class_name": "CausalWanModel", "local_attn_size": 21, "sink_size": 3,
          "num_frame_per_block": 3, "independent_first_frame": False}  # fmt: skip


def test_a_causal_wans_config_tells_its_family(
    config: WanConfig, state: dict[str, Tensor], tmp_path: Path
) -> None:
    folder = write_official(tmp_path, state, config)
    (folder / "config.json").write_text(json.dumps(official_json(config) | CAUSAL))
    assert open_checkpoint(folder).config == replace(config, family="self-forcing")


def test_a_causal_wan_with_the_tensors_of_another_is_refused(tmp_path: Path) -> None:
    config = small_config("i2v-14b")
    with pytest.raises(BadRequest, match="_class_name 'CausalWanModel', but the tensors are"):
        check({"_class_name": "CausalWanModel"}, config, tmp_path)


@pytest.mark.parametrize("field", [n for n, v in CAUSAL.items() if v and n != "_class_name"])
def test_what_only_a_causal_wan_states_needs_its_class(
    field: str, config: WanConfig, tmp_path: Path
) -> None:
    with pytest.raises(
        BadRequest, match=rf"has {field} \d+, as a causal Wan: add _class_name Caus"
    ):
        check(OFFICIAL | {field: CAUSAL[field]}, config, tmp_path)


def test_a_wans_config_may_have_narrow_heads_and_another_may_not(
    config: WanConfig, state: dict[str, Tensor], tmp_path: Path
) -> None:
    folder = write_official(tmp_path, state, config)
    stated = official_json(config) | {"num_heads": 8}
    (folder / "config.json").write_text(json.dumps(stated))
    assert open_checkpoint(folder).config.num_heads == 8
    del stated["_class_name"]
    (folder / "config.json").write_text(json.dumps(stated))
    assert open_checkpoint(folder).config.num_heads == 8  # all its sizes agree
    (folder / "config.json").write_text('{"num_heads": 8}')
    with pytest.raises(BadRequest, match=r"num_heads 8, which would make heads of 32, and"):
        open_checkpoint(folder)
    (folder / "config.json").write_text('{"num_heads": 5}')
    with pytest.raises(BadRequest, match=r"num_heads 5, but the tensors have dim 256, which"):
        open_checkpoint(folder)


def test_a_field_that_nobody_knows_is_told(config: WanConfig, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(OFFICIAL | {"use_\nmagic": True, "vace_layers": []}))
    with pytest.warns(WanExportWarning, match=r"states use_\\nmagic, which no Wan known here has"):
        check_config(read_config(file, owned=True), config, file)


BOTH = ("transformer", "transformer_2")
TWO = [["diffusers", "WanTransformer3DModel"]] * 2


def pipeline(folder: Path, state: dict[str, Tensor], *names: str, **index: Any) -> Path:
    """A pipeline's folder with these transformers and this index."""
    for name in names:
        (folder / name).mkdir(parents=True)
        save_file(state, folder / name / "diffusion_pytorch_model.safetensors")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"} | index))
    return folder


@pytest.mark.parametrize(
    ("names", "index", "message"),
    [
        (("transformer",), {"transformer_2": TWO[1]}, r"lacks transformer_2/ .* names it"),
        (("transformer",), {"boundary_ratio": 0.875}, r"transformer_2/ .*boundary_ratio 0.87"),
        (("transformer_2",), {}, r"lacks transformer/ .*the other expert is there"),
        (("transformer_2",), {"transformer": TWO[0]}, "lacks transformer/ .* names it"),
        ((), {"transformer": TWO[0]}, "lacks transformer/"),
        (BOTH, {"transformer_2": [None, None]}, "says that there is none"),
        (BOTH, {"transformer_2": None}, "says that there is none"),
        (("high_noise_model",), {}, r"lacks low_noise_model/"),
        (("low_noise_model",), {}, r"lacks high_noise_model/"),
        (("transformer", "high_noise_model"), {}, "has a model in high_noise_model and in transf"),
        (("transformer", "."), {}, r"has a model in transformer and in diffusion_pytorch_model\*"),
        (("transformer",), {"_class_name": "WanVACEPipeline"}, "'WanVACEPipeline': that is VACE"),
        (("transformer",), {"_class_name": "WanAnimatePipeline"}, "that is Wan-Animate"),
        (("transformer",), {"_class_name": "FluxPipeline"}, "'FluxPipeline': expected WanPipeline"),
        (("transformer",), {"_class_name": 3}, "_class_name 3: expected WanPipeline"),
        (("transformer",), {"transformer": ["a", "WanVACETransformer3DModel"]}, "that is VACE"),
        (("transformer",), {"transformer": ["a", "FluxTransformer2DModel"]}, "expected WanMo"),
        (("transformer",), {"transformer": "x"}, "has transformer 'x': expected a library and a"),
        *(
            (BOTH, {"boundary_ratio": value}, "expected one from 0 to 1")
            for value in (0, 1, 0.0, 1.0, True, False, "0.9", [0.9], -0.5, 10**400)
        ),
        (("transformer",), {"boundary_ratio": 0}, "boundary_ratio 0: expected one from 0 to 1"),
    ],
)  # fmt: skip
def test_a_pipeline_that_contradicts_itself_is_refused(
    names: tuple[str, ...], index: dict[str, Any], message: str, tmp_path: Path
) -> None:
    pipeline(tmp_path, {"x": torch.ones(1)}, *(name for name in names if name != "."), **index)
    if "." in names:
        save_file({"x": torch.ones(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(BadRequest, match=message) as refused:
        open_checkpoint(tmp_path)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400 + 2 * len(str(tmp_path))


def test_a_whole_pipeline_is_taken(
    state: dict[str, Tensor], config: WanConfig, tmp_path: Path
) -> None:
    one = pipeline(tmp_path / "1", state, "transformer", transformer_2=[None, None],
                   transformer=TWO[0], boundary_ratio=None)  # fmt: skip
    assert open_checkpoint(one).experts == ()
    two = pipeline(tmp_path / "2", state, *BOTH, transformer_2=TWO[1], boundary_ratio=0.9)
    assert open_checkpoint(two).boundary == 0.9
    unsaid = pipeline(tmp_path / "3", state, *BOTH, transformer_2=TWO[1], boundary_ratio=None)
    with pytest.warns(WanExportWarning, match="no boundary_ratio for its two experts"):
        assert open_checkpoint(unsaid).boundary is None
