"""The bundle with an AOTInductor engine that sections measure; built once into their folder."""

from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

import torch

from tests.tables.published.section import Place
from tests.tables.published.wan import HEAD_DIM, Size

if TYPE_CHECKING:
    from wanexport.runtime.wan_config import WanConfig

DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def wan_config(size: Size) -> "WanConfig":
    """The text-to-video model of this size."""
    from wanexport.runtime.wan_config import WanConfig

    dim = size.heads * HEAD_DIM
    return WanConfig("t2v", dim, size.ffn_dim, size.heads, size.layers, 16, 16, 0)


def engine_bundle(size: Size, place: Place) -> Path:
    """A bundle of a model of this size with random weights, and its engine for the device."""
    from wanexport.exporter.build import build
    from wanexport.graphs.config import PRESETS, Preset

    bundle = place.folder / f"aoti-{size.layers}x{size.frames}x{size.rows}x{size.columns}"
    if not bundle.exists():
        with patch.dict(PRESETS, {"measured": Preset(wan_config(size))}):
            build(
                "measured",
                random_weights=0,
                resolution=(16 * size.rows, 16 * size.columns),
                frames=4 * size.frames - 3,
                backends=["aoti"],
                device=place.device,
                dtype=DTYPES[size.dtype],
                output=bundle,
            )
    return bundle
