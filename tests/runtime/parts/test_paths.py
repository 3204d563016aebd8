"""Whatever opens a part takes its paths as text too."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from wanexport.runtime.errors import WanExportError
from wanexport.runtime.parts.image_encoder import open_image_encoder
from wanexport.runtime.parts.text_encoder import open_text_encoder
from wanexport.runtime.parts.vae import open_vae


def text_encoder(path: Any) -> object:
    return open_text_encoder(path, path)


def text_encoder_with_tokenizer(path: Any) -> object:
    """A tokenizer that opens, so that the weights are what is missing."""
    from tokenizers import Tokenizer, models

    tokenizer = Path(path).parent / "words"
    tokenizer.mkdir(exist_ok=True)
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tokenizer / "tokenizer.json"))
    return open_text_encoder(path, type(path)(tokenizer))


OPENERS = [text_encoder, text_encoder_with_tokenizer, open_vae, open_image_encoder]


@pytest.mark.parametrize("kind", ["none", "folder", "file"])
@pytest.mark.parametrize("open_part", OPENERS)
def test_text_and_a_path_are_one(
    open_part: Callable[[Any], object], kind: str, tmp_path: Path
) -> None:
    path = tmp_path / "weights"
    if kind == "folder":
        path.mkdir()
    elif kind == "file":
        path.write_bytes(b"no weights")
    refusals = []
    for given in (path, str(path)):
        with pytest.raises(WanExportError) as refusal:
            open_part(given)
        refusals.append(str(refusal.value))
    assert refusals[0] == refusals[1] and str(tmp_path) in refusals[0]
