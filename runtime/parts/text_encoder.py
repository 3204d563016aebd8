"""Text embeddings of prompts: umT5-xxl's encoder, from either layout of a checkpoint.

The official code pads a prompt to 512 tokens and trims the result: attention never looks at the
padding, so a prompt is encoded at its own length here, and by itself, so that no prompt's embedding
depends on the prompts beside it.
"""

import html
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wanexport.runtime.bundle.pinned_file import PinnedFile
from wanexport.runtime.bundle.regular_file import read_regular
from wanexport.runtime.dtypes import DTYPES
from wanexport.runtime.errors import (
    BadRequest,
    BundleError,
    EngineFailure,
    WanExportWarning,
    needing_extra,
)
from wanexport.runtime.machine.memory import free_bytes
from wanexport.runtime.parts.carried import MOST_BYTES, TOKENIZER

if TYPE_CHECKING:
    import torch

    from wanexport.runtime.parts.stored import StoredTensor
    from wanexport.runtime.parts.umt5 import UMT5Encoder

MAX_TOKENS = 512  # of a prompt; the rest is cut off
_PRECISIONS = ("bf16", "fp32")


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
    weights: str | Path,
    tokenizer: str | Path,
    *,
    device: str = "cpu",
    dtype: str = "bf16",
    warns: bool = True,
) -> "UMT5TextEncoder":
    """Open the text encoder of a diffusers folder or of an official .pth file.

    `tokenizer` is the folder with tokenizer.json. Weights and arithmetic are bf16 on any device, as
    in the official code; a CPU without bf16 instructions is several times faster in fp32, which
    holds 22 GB of weights instead of mapping 11. Where a GPU does not hold it beside the engine,
    it runs on the CPU, and a WanExportWarning says so, or with warns=False the encoder's `note`.
    Raises WanExportError without the packages, when a file is missing or damaged, holds another
    model, or when the tokenizer knows more tokens than the model.
    """
    if dtype not in _PRECISIONS:
        raise BadRequest(f"dtype of a text encoder is bf16 or fp32, got {dtype!r}")
    with needing_extra("pipeline", "the text encoder"):
        import tokenizers  # noqa: F401
        import torch

        from wanexport.runtime.parts.umt5_files import find_umt5
    weights, tokenizer = Path(weights), Path(tokenizer)
    words = _open_tokenizer(tokenizer)
    model, tensors = find_umt5(weights)
    _check_words(words, model, str(tokenizer), str(weights))
    note = _fill(model, tensors, device, getattr(torch, DTYPES[dtype].torch))
    if note and warns:
        warnings.warn(note, WanExportWarning, stacklevel=2)
    return UMT5TextEncoder(model, words, note)


def open_carried_text_encoder(file: PinnedFile, *, device: str = "cpu") -> "UMT5TextEncoder":
    """Open the text encoder of a bundle that carries one: its weights and its tokenizer, in bf16.

    Raises as open_text_encoder does; where a GPU does not hold it, it runs on the CPU, and its
    `note` says so.
    """
    with needing_extra("pipeline", "the text encoder"):
        import tokenizers  # noqa: F401
        import torch

        from wanexport.runtime.parts.umt5_files import find_carried_umt5
    (model, tensors), content = find_carried_umt5(file)
    words = _read_tokenizer(content, file.path)
    _check_words(words, model, f"the tokenizer in {file.path}", "beside it")
    note = _fill(model, tensors, device, torch.bfloat16)
    return UMT5TextEncoder(model, words, note)


def _check_words(words: Any, model: "UMT5Encoder", tokenizer: str, weights: str) -> None:
    """Raise BundleError when a tokenizer knows tokens that the model does not."""
    if words.get_vocab_size() > model.config.vocab_size:
        raise BundleError(
            f"{tokenizer} knows {words.get_vocab_size()} tokens, the text encoder {weights} "
            f"{model.config.vocab_size}: take both from one checkpoint"
        )


class UMT5TextEncoder:
    """Embeddings of prompts that `clean_prompt` has cleaned.

    `model` lies on its device, `tokenizer` is a tokenizers.Tokenizer that cuts at 512 tokens;
    `note` is for the user: why it is not where it was to be.
    """

    def __init__(self, model: "UMT5Encoder", tokenizer: Any, note: str = "") -> None:
        self.text_dim: int = model.config.dim
        self.note = note
        self._model: UMT5Encoder | None = model
        self._tokenizer = tokenizer

    def __call__(self, prompts: Sequence[str]) -> list[np.ndarray]:
        """One fp32 [n, text_dim] for each prompt, of its n <= 512 tokens, the end token included.

        A WanExportWarning says where a longer prompt is cut.
        Raises EngineFailure after `close`, and BadRequest for a prompt of which the tokenizer makes
        no token.
        """
        if self._model is None:
            raise EngineFailure("the text encoder is closed: open it again")
        return [self._encode(self._model, prompt) for prompt in prompts]

    def _encode(self, model: "UMT5Encoder", prompt: str) -> np.ndarray:
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
            tokens = torch.tensor([ids], device=model.norm.weight.device)
            return np.asarray(model(tokens)[0].float().cpu().numpy())

    def close(self) -> None:
        """Free the model's memory, that of a GPU too."""
        if self._model is None:
            return
        from wanexport.runtime.parts.torch_checkpoint import free_unused_memory

        self._model = None
        free_unused_memory()


def _fill(
    model: "UMT5Encoder", tensors: Mapping[str, "StoredTensor"], device: str, dtype: "torch.dtype"
) -> str:
    """Give the model its tensors on its device, or on the CPU where a GPU does not hold them: then
    a note says so."""
    import torch

    from wanexport.runtime.parts.fill_model import fill_model
    from wanexport.runtime.parts.torch_checkpoint import free_unused_memory

    try:
        fill_model(model, tensors, torch.device(device), dtype)
        return ""
    except torch.OutOfMemoryError:
        pass
    free_unused_memory()
    free = free_bytes(device)
    fill_model(model, tensors, torch.device("cpu"), dtype)
    return (
        f"the GPU has {free / 1e9:.1f} GB free, which do not hold the text encoder: it runs on the "
        f"CPU, which takes longer"
    )


def _open_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint's folder."""
    file = folder / TOKENIZER
    if not file.is_file():
        raise BundleError(
            f"{folder} has no {TOKENIZER}: expected the checkpoint's folder google/umt5-xxl/ or "
            f"tokenizer/"
        )
    try:
        content = read_regular(file, at_most=MOST_BYTES[TOKENIZER])
    except OSError as error:
        raise BundleError(f"cannot read {file}: {error.strerror}") from error
    return _read_tokenizer(content, file)


def _read_tokenizer(content: bytes, file: Path) -> Any:
    """umT5's tokenizer as the content of tokenizer.json describes it.

    So does transformers' AutoTokenizer up to version 4; version 5 builds T5's anew from the
    vocabulary, without the file's normalizer.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # tokenizers raises nothing narrower
        raise BundleError(f"{file} is damaged ({error}): download it again") from error
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.no_padding()
    return tokenizer
