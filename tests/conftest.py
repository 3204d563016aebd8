"""Bundles that many tests read; each is built once a session, by the product itself."""

from pathlib import Path

import numpy as np
import pytest

from wanexport.exporter.build import build


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny preset at 64x96x9 in fp32, fp16 and bf16."""
    bundle = tmp_path_factory.mktemp("bundles") / "tiny"
    for dtype in ("fp32", "fp16", "bf16"):
        build("tiny", random_weights=0, resolution="64x96", frames=9, dtype=dtype, output=bundle)
    return bundle


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
