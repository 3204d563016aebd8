"""The encoders need PyTorch and tokenizers: neither transformers nor diffusers nor safetensors."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.oracles.official_encoders import (
    IMAGE_SIZES,
    TEXT_SIZES,
    image_shapes,
    state,
    text_shapes,
    write_tokenizer,
)
from tests.oracles.transformers_encoders import clip_of, umt5_of
from tests.test_imports import ROOT, WITHOUT_TORCH

BLOCKED = {"transformers", "diffusers", "safetensors", "accelerate", "PIL", "av"}
ENCODE = """
from pathlib import Path
import numpy as np
from wanexport.runtime.parts.image_encoder import open_image_encoder
from wanexport.runtime.parts.text_encoder import clean_prompt, open_text_encoder
folder = Path({folder!r})
images = [np.linspace(-1, 1, 3 * 20 * 30, dtype=np.float32).reshape(3, 20, 30)]
for text, image in (("t5.pth", "clip.pth"), ("text_encoder", "image_encoder")):
    encoder = open_text_encoder(folder / text, folder / "tokenizer")
    (embedding,) = encoder([clean_prompt("a red  circle")])
    features = open_image_encoder(folder / image)(images)
    print(embedding.shape, float(embedding.sum()), features.shape, float(features.sum()))
assert not {blocked!r} & set(sys.modules)
"""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Both encoders in both layouts."""
    text, image = state(text_shapes(TEXT_SIZES)), state(image_shapes(IMAGE_SIZES))
    torch.save(text, tmp_path / "t5.pth")
    torch.save(image, tmp_path / "clip.pth")
    umt5_of(text, TEXT_SIZES).save_pretrained(tmp_path / "text_encoder")
    clip_of(image, IMAGE_SIZES).save_pretrained(tmp_path / "image_encoder")
    write_tokenizer(tmp_path / "tokenizer")
    return tmp_path


def test_both_encoders_open_and_encode_without_it(checkpoint: Path) -> None:
    code = (WITHOUT_TORCH + ENCODE).format(blocked=BLOCKED, folder=str(checkpoint))
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    official, diffusers = child.stdout.splitlines()
    assert official == diffusers
    assert official.startswith("(4, 24) ") and " (1, 10, 32) " in official
