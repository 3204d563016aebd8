"""transformers' umT5 and CLIP with official tensors, whose results ours must have to the bit."""

from collections.abc import Mapping
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

_UMT5 = {
    "token_embedding": "shared",
    "blocks.": "encoder.block.",
    ".norm1": ".layer.0.layer_norm",
    ".attn.": ".layer.0.SelfAttention.",
    ".pos_embedding.embedding": ".layer.0.SelfAttention.relative_attention_bias",
    ".norm2": ".layer.1.layer_norm",
    ".ffn.gate.0": ".layer.1.DenseReluDense.wi_0",
    ".ffn.fc1": ".layer.1.DenseReluDense.wi_1",
    ".ffn.fc2": ".layer.1.DenseReluDense.wo",
}
_CLIP = {
    "visual.": "",
    "cls_embedding": "embeddings.class_embedding",
    "pos_embedding": "embeddings.position_embedding.weight",
    "patch_embedding": "embeddings.patch_embedding",
    "pre_norm": "pre_layrnorm",
    "post_norm": "post_layernorm",
    "transformer.": "encoder.layers.",
    ".norm": ".layer_norm",
    ".attn.proj": ".self_attn.out_proj",
    ".mlp.0": ".mlp.fc1",
    ".mlp.2": ".mlp.fc2",
}


def umt5_of(tensors: Mapping[str, Tensor], sizes: Mapping[str, int]) -> UMT5EncoderModel:
    """The text encoder in the tensors' dtype, with eager attention."""
    config = UMT5Config(
        vocab_size=sizes["vocab"],
        d_model=sizes["dim"],
        d_kv=sizes["head_dim"],
        d_ff=sizes["ffn"],
        num_layers=sizes["layers"],
        num_heads=sizes["heads"],
        relative_attention_num_buckets=sizes["buckets"],
        attn_implementation="eager",
    )
    named = {_renamed(name, _UMT5): tensor for name, tensor in tensors.items()}
    named["encoder.final_layer_norm.weight"] = named.pop("norm.weight")
    named["encoder.embed_tokens.weight"] = named["shared.weight"]
    with torch.device("meta"):
        model = UMT5EncoderModel(config).eval()
    model.encoder.embed_tokens = model.shared
    model.load_state_dict(named, assign=True)
    return model


def clip_of(tensors: Mapping[str, Tensor], sizes: Mapping[str, int]) -> CLIPVisionModel:
    """The image tower in the tensors' dtype, with the attention of transformers' choice."""
    config = CLIPVisionConfig(
        hidden_size=sizes["dim"],
        intermediate_size=sizes["ffn"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=16,
        image_size=sizes["image"],
        patch_size=sizes["patch"],
        hidden_act="gelu",
    )
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        renamed = _renamed(name, _CLIP)
        if ".to_qkv." in name:
            for letter, rows in zip("qkv", tensor.chunk(3)):
                named[renamed.replace(".attn.to_qkv", f".self_attn.{letter}_proj")] = rows
        elif name != "visual.head":
            named[renamed] = tensor.squeeze()
    model = CLIPVisionModel(config).to(named["embeddings.class_embedding"].dtype).eval()
    # Before version 5, transformers wraps the tower once more.
    getattr(model, "vision_model", model).load_state_dict(named)
    return model


def umt5_embedding(model: UMT5EncoderModel, ids: list[int]) -> Tensor:
    """The embedding [n, dim] of token ids.

    The softmax is fp32's, as in the official code and in transformers before version 5: where a CPU
    takes it of bf16, some elements are rounded otherwise.
    """
    with torch.inference_mode(), patch.object(functional, "softmax", _softmax):
        tokens = torch.tensor([ids], device=model.device)
        embedding: Tensor = model(input_ids=tokens).last_hidden_state[0]
    return embedding


def clip_features(model: CLIPVisionModel, pixels: Tensor) -> Tensor:
    """The features [B, tokens, dim] of prepared pixels: what the last block but one gives."""
    with torch.inference_mode():
        features: Tensor = model(pixels, output_hidden_states=True).hidden_states[-2]
    return features


def _softmax(scores: Tensor, dim: int) -> Tensor:
    return scores.float().softmax(dim).to(scores.dtype)


def _renamed(name: str, table: Mapping[str, str]) -> str:
    for old, new in table.items():
        name = name.replace(old, new)
    return name
