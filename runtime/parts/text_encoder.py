"""Text embeddings of prompts: umT5-xxl's encoder, from either layout of a checkpoint.

The official file is converted to transformers' `UMT5EncoderModel`, whose eager attention computes
what the official code does, to the bit. The official code pads a prompt to 512 tokens and trims the
result: attention never looks at the padding, so a prompt is encoded at its own length here, and by
itself, so that no prompt's embedding depends on the prompts beside it.
"""

import html
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wanexport.runtime.dtypes import DTYPES
from wanexport.runtime.errors import (
    BadRequest,
    BundleError,
    EngineFailure,
    WanExportWarning,
    needing_extra,
    printable,
)
from wanexport.runtime.key_tables import key_table, required
from wanexport.runtime.machine.memory import free_bytes

MAX_TOKENS = 512  # of a prompt; the rest is cut off
_OFFICIAL_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
_PRECISIONS = ("bf16", "fp32")

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


def clean_prompt(text: str) -> str:
    """The prompt as the official code tokenizes it: its `whitespace` mode of cleaning.

    Broken characters are repaired, HTML entities resolved, twice for those escaped twice, and each
    run of white space becomes one space. Raises WanExportError without ftfy.
    """
    with needing_extra("pipeline", "cleaning a prompt"):
        import ftfy
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def open_text_encoder(
    weights: str | Path, tokenizer: str | Path, *, device: str = "cpu", dtype: str = "bf16"
) -> "UMT5TextEncoder":
    """Open the text encoder of a diffusers folder or of an official .pth file.

    `tokenizer` is the folder with tokenizer.json. Weights and arithmetic are bf16 on any device, as
    in the official code; a CPU without bf16 instructions is several times faster in fp32, which
    holds 22 GB of weights instead of mapping 11. Where a GPU does not hold it beside the engine,
    it runs on the CPU, and a WanExportWarning says so.
    Raises WanExportError without the packages, when a file is missing or damaged, holds another
    model, or when the tokenizer knows more tokens than the model.
    """
    if dtype not in _PRECISIONS:
        raise BadRequest(f"dtype of a text encoder is bf16 or fp32, got {dtype!r}")
    with needing_extra("pipeline", "the text encoder"):
        import tokenizers  # noqa: F401
        import torch
        import transformers  # noqa: F401
    weights, tokenizer = Path(weights), Path(tokenizer)
    words = _open_tokenizer(tokenizer)
    open_model = _open_diffusers if weights.is_dir() else _open_official
    model = open_model(weights, getattr(torch, DTYPES[dtype].torch))
    if words.get_vocab_size() > model.config.vocab_size:
        raise BundleError(
            f"{tokenizer} knows {words.get_vocab_size()} tokens, the text encoder {weights} "
            f"{model.config.vocab_size}: take both from one checkpoint"
        )
    return UMT5TextEncoder(_placed(model, device), words)


class UMT5TextEncoder:
    """Embeddings of prompts that `clean_prompt` has cleaned.

    `model` is a UMT5EncoderModel on its device, `tokenizer` a tokenizers.Tokenizer that cuts at
    512 tokens.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.text_dim: int = model.config.d_model
        self._model = model
        self._tokenizer = tokenizer

    def __call__(self, prompts: Sequence[str]) -> list[np.ndarray]:
        """One fp32 [n, text_dim] for each prompt, of its n <= 512 tokens, the end token included.

        A WanExportWarning says where a longer prompt is cut.
        Raises EngineFailure after `close`, and BadRequest for a prompt of which the tokenizer makes
        no token.
        """
        if self._model is None:
            raise EngineFailure("the text encoder is closed: open it again")
        return [self._encode(prompt) for prompt in prompts]

    def _encode(self, prompt: str) -> np.ndarray:
        import torch

        encoding = self._tokenizer.encode(prompt)
        ids = encoding.ids
        if encoding.overflowing:
            end = max(stop for _, stop in encoding.offsets)
            warnings.warn(
                f"the prompt {prompt[:40]!r}... has more than {MAX_TOKENS} tokens: what follows "
                f"its character {end} of {len(prompt)} is left out",
                WanExportWarning,
                stacklevel=3,
            )
        if not ids:
            raise BadRequest(
                f"the tokenizer makes no token of the prompt {prompt!r:.60}, not even one for its "
                f"end: expected umT5's tokenizer, or another prompt"
            )
        with torch.inference_mode():
            tokens = torch.tensor([ids], device=self._model.device)
            embeddings = self._model(input_ids=tokens).last_hidden_state[0]
            return np.asarray(embeddings.float().cpu().numpy())

    def close(self) -> None:
        """Free the model's memory, that of a GPU too."""
        if self._model is None:
            return
        from wanexport.runtime.parts.torch_checkpoint import free_unused_memory

        self._model = None
        free_unused_memory()


def _placed(model: Any, device: str) -> Any:
    """The model on its device, or on the CPU where a GPU's memory does not hold it."""
    import torch

    from wanexport.runtime.parts.torch_checkpoint import free_unused_memory

    try:
        return model.to(device)
    except torch.OutOfMemoryError:
        pass
    model.to("cpu")
    free_unused_memory()
    warnings.warn(
        f"the GPU has {free_bytes(device) / 1e9:.1f} GB free, which do not hold the text encoder: "
        f"it runs on the CPU, which takes longer",
        WanExportWarning,
        stacklevel=3,
    )
    return model


def _open_tokenizer(folder: Path) -> Any:
    """umT5's tokenizer as tokenizer.json describes it.

    So does transformers' AutoTokenizer up to version 4; version 5 builds T5's anew from the
    vocabulary, without the file's normalizer.
    """
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    if not file.is_file():
        raise BundleError(
            f"{folder} has no tokenizer.json: expected the checkpoint's folder google/umt5-xxl/ or "
            f"tokenizer/"
        )
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing narrower
        raise BundleError(f"{file} is damaged ({error}): download it again") from error
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.no_padding()
    return tokenizer


def _open_official(path: Path, dtype: Any) -> Any:
    """A UMT5EncoderModel of the official file's tensors; without a cast they stay mapped."""
    import torch
    from transformers import UMT5EncoderModel

    from wanexport.runtime.parts.torch_checkpoint import load_converted, read_state_dict

    official = read_state_dict(path)
    with torch.device("meta"):
        model = UMT5EncoderModel(_config(official, path))
    model.encoder.embed_tokens = model.shared
    tensors = {_transformers_name(name): t.to(dtype) for name, t in official.items()}
    if "shared.weight" in tensors:
        tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]
    return load_converted(model, tensors, path)


def _config(tensors: Mapping[str, Any], path: Path) -> Any:
    """The UMT5Config that follows from the official tensors.

    Raises BundleError when one that decides it is missing.
    """
    from transformers import UMT5Config

    what = f"{printable(path)} is no umT5 encoder"
    expected = f"the official {_OFFICIAL_FILE}, or a folder text_encoder/"
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    shape = required(shapes, what, expected, BundleError)
    vocab_size, dim = shape("token_embedding.weight", 2)
    buckets, heads = shape("blocks.0.pos_embedding.embedding.weight", 2)
    blocks = {name.split(".")[1] for name in tensors if name.startswith("blocks.")}
    return UMT5Config(
        vocab_size=vocab_size,
        d_model=dim,
        d_kv=shape("blocks.0.attn.q.weight", 2)[0] // max(1, heads),
        d_ff=shape("blocks.0.ffn.fc1.weight", 2)[0],
        num_layers=len(blocks),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        attn_implementation="eager",
    )


def _open_diffusers(folder: Path, dtype: Any) -> Any:
    """The UMT5EncoderModel of a folder text_encoder/."""
    from transformers import UMT5EncoderModel

    from wanexport.runtime.parts.torch_checkpoint import load_pretrained

    # Published folders say that their embeddings are not tied; transformers 5.0 takes their word.
    return load_pretrained(
        UMT5EncoderModel, folder, dtype, attn_implementation="eager", tie_word_embeddings=True
    )
