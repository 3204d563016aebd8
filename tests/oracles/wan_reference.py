"""Small Wan models in diffusers, and their tensors under the official names: the tests' oracle.

The key map here is written from the official conversion rules, apart from the product's own table.
"""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor

from wanexport.graphs.checkpoint import open_checkpoint
from wanexport.graphs.config import PRESETS
from wanexport.graphs.weights import CheckpointWeights, write_weights
from wanexport.runtime.family import family_of
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.wan_config import WanConfig

VARIANTS = ("t2v-1.3b", "i2v-14b", "flf2v-14b", "t2v-a14b", "i2v-a14b", "ti2v-5b")

_TO_OFFICIAL = (
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("condition_embedder.image_embedder.norm1", "img_emb.proj.0"),
    ("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
    ("condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
    ("condition_embedder.image_embedder.norm2", "img_emb.proj.4"),
    ("condition_embedder.image_embedder.pos_embed", "img_emb.emb_pos"),
    ("proj_out", "head.head"),
    ("ffn.net.0.proj", "ffn.0"),
    ("ffn.net.2", "ffn.2"),
    ("attn1", "self_attn"),
    ("attn2", "cross_attn"),
    ("to_out.0", "o"),
    ("add_k_proj", "k_img"),
    ("add_v_proj", "v_img"),
    ("norm_added_k", "norm_k_img"),
    ("norm2", "norm3"),
    ("scale_shift_table", "modulation"),
)


def official_key(key: str) -> str:
    """diffusers' parameter name -> the official one."""
    if key == "scale_shift_table":
        return "head.modulation"
    for theirs, official in _TO_OFFICIAL:
        if theirs != "norm2" or "image_embedder" not in key:
            key = key.replace(theirs, official)
    return re.sub(r"\.to_([qkv])\.", r".\1.", key)


def small_config(preset: str, num_layers: int = 2) -> WanConfig:
    """The preset's family in the tiny one's sizes: what is traced of both is the same."""
    config, tiny = PRESETS[preset].config, PRESETS["tiny"].config
    return replace(
        config,
        dim=tiny.dim,
        ffn_dim=tiny.ffn_dim,
        num_heads=tiny.num_heads,
        num_layers=num_layers,
    )


def small_geometry(config: WanConfig) -> Geometry:
    """Three latent frames of 4 x 6 tokens."""
    stride = family_of(config).vae.spatial_stride
    return Geometry(8 * stride, 12 * stride, 9, stride)


def diffusers_model(config: WanConfig, seed: int = 0) -> WanTransformer3DModel:
    """diffusers' model in fp32 with random weights in which every parameter matters."""
    torch.manual_seed(seed)
    has_image = bool(config.image_tokens)
    model = WanTransformer3DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        image_dim=1280 if has_image else None,
        added_kv_proj_dim=config.dim if has_image else None,
        pos_embed_seq_len=514 if config.image_tokens == 514 else None,
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_random(name, parameter))
    return model.requires_grad_(False)


def _random(name: str, parameter: Tensor) -> Tensor:
    values = torch.randn(parameter.shape)
    if "norm" in name and name.endswith("weight"):
        return 1 + 0.1 * values
    if parameter.dim() < 2 or "table" in name or "pos_embed" in name:
        return 0.1 * values
    return values / parameter[0].numel() ** 0.5


def official_state(model: WanTransformer3DModel) -> dict[str, Tensor]:
    """The model's tensors under the official names."""
    return {official_key(k): v.contiguous() for k, v in model.state_dict().items()}


def official_json(config: WanConfig) -> dict[str, Any]:
    """What an official checkpoint's config.json holds."""
    return {
        "_class_name": "WanModel",
        "dim": config.dim,
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "in_dim": config.in_channels,
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "out_dim": config.out_channels,
        "text_len": config.text_len,
    }


def with_changes(state: dict[str, Tensor], **changes: Any) -> dict[str, Tensor]:
    """The tensors with some replaced, or with None removed; __ in a name stands for a dot."""
    changed = {name.replace("__", "."): value for name, value in changes.items()}
    return {n: t for n, t in {**state, **changed}.items() if t is not None}


def write_official(folder: Path, state: dict[str, Tensor], config: WanConfig) -> Path:
    """A single-file checkpoint in the official layout."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(official_json(config)))
    return folder


def write_diffusers(folder: Path, model: WanTransformer3DModel, **index: Any) -> Path:
    """A checkpoint in diffusers' layout, written by diffusers itself."""
    model.save_pretrained(folder / "transformer")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", **index}))
    return folder


def convert(folder: Path, output: Path, dtype: str = "fp32") -> bytes:
    """The weights file that a one-expert checkpoint becomes."""
    checkpoint = open_checkpoint(folder)
    weights = CheckpointWeights(checkpoint.tensors[""])
    write_weights(output, checkpoint.config, dtype, weights)
    return output.read_bytes()


def diffusers_velocity(
    model: WanTransformer3DModel, config: WanConfig, inputs: dict[str, np.ndarray]
) -> np.ndarray:
    """diffusers' velocity for inputs shaped as our graph's."""
    dtype, device = model.patch_embedding.weight.dtype, model.patch_embedding.weight.device
    t = {name: torch.from_numpy(array).to(device) for name, array in inputs.items()}
    latent = torch.cat([t["latent"], t["condition"]], dim=1) if "condition" in t else t["latent"]
    timestep = t["timestep"]
    if config.family == "ti2v":
        tokens_per_frame = latent.shape[3] * latent.shape[4] // 4
        timestep = timestep.repeat_interleave(tokens_per_frame)[None]
    image = t.get("image")
    if image is not None:
        image = image.reshape(-1, 257, image.shape[-1]).to(dtype)
    with torch.no_grad():
        output = model(latent.to(dtype), timestep, t["text"].to(dtype), image, return_dict=False)
    return output[0].float().cpu().numpy()
