"""Where either layout of a checkpoint has umT5's tensors, and the encoder that they make."""

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
from wanexport.runtime.parts.umt5 import UMT5Config, UMT5Encoder

_OFFICIAL_FILE = "models_t5_umt5-xxl-enc-bf16.pth"

_ROWS = {  # official name -> transformers' name
    "token_embedding.weight": "shared.weight",
    "norm.weight": "encoder.final_layer_norm.weight",
    "blocks.{}.norm1.weight": "encoder.block.{}.layer.0.layer_norm.weight",
    "blocks.{}.attn.q.weight": "encoder.block.{}.layer.0.SelfAttention.q.weight",
    "blocks.{}.attn.k.weight": "encoder.block.{}.layer.0.SelfAttention.k.weight",
    "blocks.{}.attn.v.weight": "encoder.block.{}.layer.0.SelfAttention.v.weight",
    "blocks.{}.attn.o.weight": "encoder.block.{}.layer.0.SelfAttention.o.weight",
    "blocks.{}.pos_embedding.embedding.weight": (
        "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
    ),
    "blocks.{}.norm2.weight": "encoder.block.{}.layer.1.layer_norm.weight",
    "blocks.{}.ffn.gate.0.weight": "encoder.block.{}.layer.1.DenseReluDense.wi_0.weight",
    "blocks.{}.ffn.fc1.weight": "encoder.block.{}.layer.1.DenseReluDense.wi_1.weight",
    "blocks.{}.ffn.fc2.weight": "encoder.block.{}.layer.1.DenseReluDense.wo.weight",
}
_transformers_name = key_table(_ROWS)
_TIED = "encoder.embed_tokens.weight"  # the second name of shared.weight, in some folders the only
_SIZES = {  # in config.json, and what it means to leave one out
    "vocab_size": 250112,
    "d_model": 512,
    "num_heads": 6,
    "d_kv": 64,
    "d_ff": 1024,
    "num_layers": 8,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
}
_ACTIVATION = "gated-gelu"
_MAX_DISTANCE, _NORM_EPS = 128, 1e-6  # of the official code, which no tensor tells

Found = tuple[UMT5Encoder, dict[str, StoredTensor]]


def find_umt5(weights: Path) -> Found:
    """The encoder, on the meta device, and its parameters in an official file or a folder.

    Raises BundleError when the checkpoint is missing or damaged, or holds another model.
    """
    return _find_in_folder(weights) if weights.is_dir() else _find_in_official(weights)


def find_carried_umt5(file: PinnedFile) -> tuple[Found, bytes]:
    """The encoder and its parameters in a file of a bundle, and its tokenizer.json.

    Raises BundleError when the file is damaged, or holds another model.
    """
    own = read_carried(file, UMT5Config)
    found = _find(own.config, own.tensors, str, file.path, others=False)
    return found, own.tokenizer


def _find_in_official(path: Path) -> Found:
    stored = read_stored(path)
    shapes = {name: tuple(each.tensor.shape) for name, each in stored.items()}
    return _find(_official_config(shapes, path), stored, str, path, others=False)


def _find_in_folder(folder: Path) -> Found:
    config, stored = read_config(folder), read_folder(folder)
    if "shared.weight" not in stored and _TIED in stored:
        stored["shared.weight"] = stored[_TIED]
    sizes = _folder_config(config, len(stored), folder)
    return _find(sizes, stored, _transformers_name, folder, others=True)


def _find(
    config: UMT5Config,
    stored: Mapping[str, StoredTensor],
    name_of: Callable[[str], str],
    path: Path,
    *,
    others: bool,
) -> Found:
    with torch.device("meta"):
        model = UMT5Encoder(config)
    return model, parameters_in(stored, model, lambda n: Place(name_of(n)), path, others=others)


def _official_config(shapes: Mapping[str, tuple[int, ...]], path: Path) -> UMT5Config:
    """The sizes that follow from the official tensors' shapes.

    Raises BundleError when one that decides them is missing.
    """
    what = f"{printable(path)} is no umT5 encoder"
    expected = f"the official {_OFFICIAL_FILE}, or a folder text_encoder/"
    shape = required(shapes, what, expected, BundleError)
    vocab_size, dim = shape("token_embedding.weight", 2)
    buckets, heads = shape("blocks.0.pos_embedding.embedding.weight", 2)
    blocks = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
    return _config(
        path,
        vocab_size=vocab_size,
        dim=dim,
        num_heads=heads,
        head_dim=shape("blocks.0.attn.q.weight", 2)[0] // max(1, heads),
        ffn_dim=shape("blocks.0.ffn.fc1.weight", 2)[0],
        num_layers=len(blocks),
        num_buckets=buckets,
        max_distance=_MAX_DISTANCE,
        norm_eps=_NORM_EPS,
    )


def _folder_config(config: Mapping[str, Any], num_tensors: int, folder: Path) -> UMT5Config:
    """The sizes that a config.json says.

    Raises BundleError when it says what no umT5 has, or more layers than the folder has tensors.
    """
    if (activation := config.get("feed_forward_proj", _ACTIVATION)) != _ACTIVATION:
        raise BundleError(
            f"{folder} is no umT5 encoder: its feed_forward_proj is {activation!r:.60}, expected "
            f"{_ACTIVATION!r}"
        )
    sizes = config_sizes(folder, config, _SIZES, layers="num_layers", num_tensors=num_tensors)
    return _config(
        folder,
        vocab_size=sizes["vocab_size"],
        dim=sizes["d_model"],
        num_heads=sizes["num_heads"],
        head_dim=sizes["d_kv"],
        ffn_dim=sizes["d_ff"],
        num_layers=sizes["num_layers"],
        num_buckets=sizes["relative_attention_num_buckets"],
        max_distance=sizes["relative_attention_max_distance"],
        norm_eps=config.get("layer_norm_epsilon", _NORM_EPS),
    )


def _config(path: Path, **values: Any) -> UMT5Config:
    """The config of these values. Raises BundleError where no encoder can be built of them."""
    try:
        return UMT5Config(**values)
    except (ValueError, TypeError) as error:
        raise BundleError(f"{printable(path)} is no umT5 encoder: {error}") from error
