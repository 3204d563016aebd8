"""Every spelling of a LoRA is the same LoRA."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.oracles.wan_reference import diffusers_model, official_key, small_config
from tests.runtime.lora.tiny import (
    IMAGE_CONFIG,
    SHAPES,
    base,
    is_close,
    merged,
    pair,
    random,
    stack,
    wide,
    write,
)
from wanexport.graphs.config import PRESETS
from wanexport.runtime.bundle.signature import parameter_shapes
from wanexport.runtime.lora.merge import LoraStack
from wanexport.runtime.lora.names import flat, targets

# Every linear module of the tiny model, and its name in diffusers, from the official conversion.
MODULES = [name.removesuffix(".weight") for name, shape in SHAPES.items() if len(shape) == 2]
DIFFUSERS = (
    (r"self_attn\.([qkv])$", r"attn1.to_\1"),
    (r"cross_attn\.([qkv])$", r"attn2.to_\1"),
    (r"self_attn\.o$", "attn1.to_out.0"),
    (r"cross_attn\.o$", "attn2.to_out.0"),
    (r"ffn\.0$", "ffn.net.0.proj"),
    (r"ffn\.2$", "ffn.net.2"),
    (r"head\.head$", "proj_out"),
    (r"text_embedding\.0$", "condition_embedder.text_embedder.linear_1"),
    (r"text_embedding\.2$", "condition_embedder.text_embedder.linear_2"),
    (r"time_embedding\.0$", "condition_embedder.time_embedder.linear_1"),
    (r"time_embedding\.2$", "condition_embedder.time_embedder.linear_2"),
    (r"time_projection\.1$", "condition_embedder.time_proj"),
)


def in_diffusers(module: str) -> str:
    for pattern, name in DIFFUSERS:
        module = re.sub(pattern, name, module)
    return module


def dotted(prefix: str, down: str = "lora_A", up: str = "lora_B") -> Any:
    return lambda module: (f"{prefix}{module}.{down}.weight", f"{prefix}{module}.{up}.weight")


def flattened(prefix: str) -> Any:
    return lambda module: dotted(prefix, "lora_down", "lora_up")(module.replace(".", "_"))


def of_diffusers(spelling: Any) -> Any:
    return lambda module: spelling(in_diffusers(module))


SPELLINGS = {
    "diffusion-pipe": dotted("diffusion_model."),
    "lightx2v": dotted("diffusion_model.", "lora_down", "lora_up"),
    "comfy": dotted("model.diffusion_model."),
    "bare": dotted("", "lora_down", "lora_up"),
    "old diffusers": dotted("", "lora.down", "lora.up"),
    "kohya": flattened("lora_unet_"),
    "kohya with diffusers' names": of_diffusers(flattened("lora_unet_")),
    "VideoX-Fun": flattened("lora_unet__"),
    "diffusers": of_diffusers(dotted("transformer.")),
    "diffusers without prefix": of_diffusers(dotted("")),
    "the second expert": of_diffusers(dotted("transformer_2.")),
    "PEFT": dotted("base_model.model."),
    "PEFT on diffusers": of_diffusers(dotted("base_model.model.")),
    "DiffSynth": dotted("pipe.dit."),
    "an adapter named default": dotted("", "lora_A.default", "lora_B.default"),
    "an adapter of another name": dotted("pipe.dit.", "lora_A.my-style", "lora_B.my-style"),
    "LyCORIS": flattened("lycoris_"),
    "SimpleTuner": of_diffusers(flattened("lycoris_")),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_changes_every_module_alike(spelling: str, tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    for number, module in enumerate(MODULES):
        factors = pair(module, seed=number).values()
        tensors |= dict(zip(SPELLINGS[spelling](module), factors))
    lora = stack(tmp_path, tensors)
    for number, module in enumerate(MODULES):
        down, up = pair(module, seed=number).values()
        name = f"{module}.weight"
        assert is_close(lora.merge(name, base(name)), wide(base(name)) + wide(up) @ wide(down))
        assert lora.changes(name) and not lora.changes(f"{module}.bias")
    assert lora.describe()[0]["changes"] == {"low rank": len(MODULES)}


def test_kohya_names_half_converted_to_dots_are_found(tmp_path: Path) -> None:
    down, up = pair("blocks.0.self_attn.q").values()
    tensors = {
        "lora_unet_blocks.0.self_attn_q.lora_down.weight": down,
        "lora_unet_blocks.0.self_attn_q.lora_up.weight": up,
    }
    name = "blocks.0.self_attn.q.weight"
    found = merged(tmp_path, name, tensors)
    assert is_close(found, wide(base(name)) + wide(up) @ wide(down))


def test_adapters_of_kohya_and_lycoris_are_found_under_flat_names(tmp_path: Path) -> None:
    tensors = {
        "lora_unet_blocks_0_ffn_0.lokr_w1": random(2, 4),
        "lora_unet_blocks_0_ffn_0.lokr_w2": random(12, 4),
        "lora_unet_blocks_0_ffn_0.alpha": torch.tensor(1.0),
        "lycoris_blocks_1_norm3.w_norm": random(16),
        "lora_unet_blocks_1.diff_m": random(1, 6, 16),
        "lora_unet_patch_embedding.diff_b": random(16),
    }
    lora = stack(tmp_path, tensors)
    kinds = {"LoKr": 1, "diff_b": 1, "diff_m": 1, "w_norm": 1}
    assert lora.describe()[0]["changes"] == kinds


@pytest.mark.parametrize("preset", PRESETS)
def test_no_two_names_of_a_model_are_alike_without_dots(preset: str) -> None:
    shapes = parameter_shapes(PRESETS[preset].config)
    modules = {name.rpartition(".")[0] for name in shapes}
    assert len({flat(name) for name in modules | set(shapes)}) == len(modules | set(shapes))
    found = targets(shapes)
    assert all(found[flat(name)] == name for name in modules | set(shapes))


@pytest.mark.parametrize("preset", ["i2v-14b", "flf2v-14b"])
def test_the_names_of_diffusers_lead_to_the_official_ones(preset: str) -> None:
    config = small_config(preset, num_layers=1)
    found = targets(parameter_shapes(config))
    for name in diffusers_model(config).state_dict():
        if "norm_added_q" not in name:
            assert found[flat(name)] == official_key(name)


def test_a_lora_of_the_image_branch_fits_a_model_with_one(tmp_path: Path) -> None:
    tensors = {
        "diffusion_model.blocks.0.cross_attn.k_img.lora_A.weight": random(2, 16),
        "diffusion_model.blocks.0.cross_attn.k_img.lora_B.weight": random(16, 2),
        "lora_unet_blocks_1_cross_attn_norm_k_img.diff": random(16),
        "transformer.condition_embedder.image_embedder.norm1.w_norm": random(1280),
    }
    file = write(tmp_path, tensors)
    changes = LoraStack([(file, 1)], parameter_shapes(IMAGE_CONFIG)).describe()[0]["changes"]
    assert changes == {"diff": 1, "low rank": 1, "w_norm": 1}
