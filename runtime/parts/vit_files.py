"""Where either layout of a checkpoint has the tensors of CLIP's ViT, and the tower they make."""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from wanexport.runtime.bundle.pinned_file import PinnedFile
from wanexport.runtime.errors import BundleError, printable
from wanexport.runtime.key_tables import key_table, required
from wanexport.runtime.parts.carried_file import read_carried
from wanexport.runtime.parts.fill_model import Place, parameters_in
from wanexport.runtime.parts.model_folder import config_sizes, read_config, read_folder
from wanexport.runtime.parts.stored import StoredTensor
from wanexport.runtime.parts.torch_checkpoint import read_stored
from wanexport.runtime.parts.vit import VisionTransformer, ViTConfig

_OFFICIAL_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
_VISUAL = "visual."
_HEAD = "visual.head"  # the projection to CLIP's own embedding, which Wan does not use
_STACKED = re.compile(r"(.*\.attn\.)([qkv])(\..*)")  # the official tensor stacks all three
_NUM_HEADS, _NORM_EPS = 16, 1e-5  # of the official code, which no tensor tells

_ROWS = {  # our name -> transformers' name
    "cls_embedding": "embeddings.class_embedding",
    "pos_embedding": "embeddings.position_embedding.weight",
    "patch_embedding.*": "embeddings.patch_embedding.*",
    "pre_norm.*": "pre_layrnorm.*",
    "post_norm.*": "post_layernorm.*",
    "transformer.{}.norm1.*": "encoder.layers.{}.layer_norm1.*",
    "transformer.{}.attn.q.*": "encoder.layers.{}.self_attn.q_proj.*",
    "transformer.{}.attn.k.*": "encoder.layers.{}.self_attn.k_proj.*",
    "transformer.{}.attn.v.*": "encoder.layers.{}.self_attn.v_proj.*",
    "transformer.{}.attn.proj.*": "encoder.layers.{}.self_attn.out_proj.*",
    "transformer.{}.norm2.*": "encoder.layers.{}.layer_norm2.*",
    "transformer.{}.mlp.0.*": "encoder.layers.{}.mlp.fc1.*",
    "transformer.{}.mlp.2.*": "encoder.layers.{}.mlp.fc2.*",
}
_transformers_name = key_table(_ROWS)
_WRAPPED = "vision_model."  # before transformers' names, in folders of most of its versions
_SIZES = {  # in config.json, and what it means to leave one out
    "image_size": 224,
    "patch_size": 32,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
}
_ACTIVATION, _DEFAULT_ACTIVATION = "gelu", "quick_gelu"

Found = tuple[VisionTransformer, dict[str, StoredTensor]]


def find_vit(weights: Path) -> Found:
    """The tower, on the meta device, and its parameters in an official file or a folder.

    Raises BundleError when the checkpoint is missing or damaged, or holds another model.
    """
    return _find_in_folder(weights) if weights.is_dir() else _find_in_official(weights)


def find_carried_vit(file: PinnedFile) -> Found:
    """The same of a file of a bundle. Raises BundleError when it is damaged, or another model's."""
    own = read_carried(file, ViTConfig)
    return _find(own.config, own.tensors, Place, file.path, others=False)


def _find_in_official(path: Path) -> Found:
    stored = {
        name: tensor
        for name, tensor in read_stored(path).items()
        if name.startswith(_VISUAL) and name != _HEAD
    }
    shapes = {name: tuple(each.tensor.shape) for name, each in stored.items()}
    return _find(_official_config(shapes, path), stored, _official_place, path, others=False)


def _find_in_folder(folder: Path) -> Found:
    config, stored = read_config(folder), read_folder(folder)
    prefix = _WRAPPED if any(name.startswith(_WRAPPED) for name in stored) else ""
    sizes = _folder_config(config, len(stored), folder)
    return _find(
        sizes, stored, lambda name: Place(prefix + _transformers_name(name)), folder, others=True
    )


def _find(
    config: ViTConfig,
    stored: Mapping[str, StoredTensor],
    place_of: Callable[[str], Place],
    path: Path,
    *,
    others: bool,
) -> Found:
    with torch.device("meta"):
        model = VisionTransformer(config)
    return model, parameters_in(stored, model, place_of, path, others=others)


def _official_place(name: str) -> Place:
    if match := _STACKED.fullmatch(name):
        block, letter, last = match.groups()
        return Place(f"{_VISUAL}{block}to_qkv{last}", "qkv".index(letter), 3)
    return Place(_VISUAL + name)


def _official_config(shapes: Mapping[str, tuple[int, ...]], path: Path) -> ViTConfig:
    """The sizes that follow from the official tensors' shapes.

    Raises BundleError when one that decides them is missing.
    """
    what = f"{printable(path)} is no CLIP of Wan's"
    expected = f"the official {_OFFICIAL_FILE}, or a folder image_encoder/"
    shape = required(shapes, what, expected, BundleError)
    dim, _, patch_size, _ = shape("visual.patch_embedding.weight", 4)
    patches_a_side = math.isqrt(max(0, shape("visual.pos_embedding", 3)[1] - 1))
    blocks = {name.split(".")[2] for name in shapes if name.startswith("visual.transformer.")}
    return _config(
        path,
        image_size=patches_a_side * patch_size,
        patch_size=patch_size,
        dim=dim,
        mlp_dim=shape("visual.transformer.0.mlp.0.weight", 2)[0],
        num_heads=_NUM_HEADS,
        num_layers=len(blocks),
        norm_eps=_NORM_EPS,
    )


def _folder_config(config: Mapping[str, Any], num_tensors: int, folder: Path) -> ViTConfig:
    """The sizes that a config.json says, of the tower alone or of all of CLIP.

    Raises BundleError when it says what Wan's CLIP has not, or more layers than the folder has
    tensors.
    """
    vision = config.get("vision_config")
    config = vision if isinstance(vision, dict) else config
    if (activation := config.get("hidden_act", _DEFAULT_ACTIVATION)) != _ACTIVATION:
        raise BundleError(
            f"{folder} is no CLIP of Wan's: its hidden_act is {activation!r:.60}, expected "
            f"{_ACTIVATION!r}"
        )
    layers = "num_hidden_layers"
    sizes = config_sizes(folder, config, _SIZES, layers=layers, num_tensors=num_tensors)
    return _config(
        folder,
        image_size=sizes["image_size"],
        patch_size=sizes["patch_size"],
        dim=sizes["hidden_size"],
        mlp_dim=sizes["intermediate_size"],
        num_heads=sizes["num_attention_heads"],
        num_layers=sizes[layers],
        norm_eps=config.get("layer_norm_eps", _NORM_EPS),
    )


def _config(path: Path, **values: Any) -> ViTConfig:
    """The config of these values. Raises BundleError where no tower can be built of them."""
    try:
        return ViTConfig(**values)
    except (ValueError, TypeError) as error:
        raise BundleError(f"{printable(path)} is no CLIP of Wan's: {error}") from error
