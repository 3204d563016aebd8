"""A bundle that carries small encoders, and the checkpoint that they come from."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from tests.runtime.bundle.small_bundle import CONFIG, small_bundle
from tests.runtime.parts.vae_bundle import asked_for, small_request
from wanexport.exporter.bundle.writer import open_bundle
from wanexport.exporter.sets.encoders import OrderedEncoder, add_encoders, order_encoders
from wanexport.runtime.bundle.manifest import read_manifest

T5 = "models_t5_umt5-xxl-enc-bf16.pth"
CLIP = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
SIZES = {**TEXT_SIZES, "dim": CONFIG.text_dim}
I2V = replace(CONFIG, family="i2v", in_channels=36, image_tokens=257)


def checkpoint(folder: Path, layout: str, sizes: Mapping[str, int] = SIZES) -> Path:
    """The encoders of a checkpoint: umT5 and CLIP with the same tensors in either layout."""
    text, image = state(text_shapes(sizes)), state(image_shapes(IMAGE_SIZES))
    folder.mkdir(parents=True)
    if layout == "official":
        write_tokenizer(folder / "google" / "umt5-xxl")
        torch.save({name: tensor.bfloat16() for name, tensor in text.items()}, folder / T5)
        torch.save(image, folder / CLIP)
        return folder
    write_tokenizer(folder / "tokenizer")
    umt5_of(text, sizes).save_pretrained(folder / "text_encoder")
    clip_of(image, IMAGE_SIZES).save_pretrained(folder / "image_encoder")
    return folder


def ordered(bundle: Path, folder: Path) -> list[OrderedEncoder]:
    """What a build with --parts orders for the bundle's model."""
    request = small_request(read_manifest(bundle))
    return order_encoders(request, {"path": str(folder)}, asked_for(parts=True))


def carry(bundle: Path, folder: Path, told: list[Any] | None = None) -> list[str]:
    """Do of a build what adds the encoders; return what was reused, and add what was told."""
    encoders = ordered(bundle, folder)
    said = [] if told is None else told
    with open_bundle(bundle, read_manifest(bundle)) as writer:
        reused = add_encoders(writer, encoders, lambda *stage: said.append(stage))
        writer.commit()
    return reused


def carrying_bundle(folder: Path, layout: str = "official", **options: Any) -> Path:
    """A bundle of an engine that takes pictures, with both encoders; `model` beside it."""
    bundle = small_bundle(folder / "bundle", config=options.get("config", I2V))
    carry(bundle, checkpoint(folder / "model", layout))
    return bundle
