"""Bundles that many tests read; each is built once a session, by the product itself."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.wan_reference import diffusers_model, official_state, small_config
from wanexport.exporter.build import build
from wanexport.graphs.config import WanConfig


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny preset at 64x96x9 in fp32, fp16 and bf16."""
    bundle = tmp_path_factory.mktemp("bundles") / "tiny"
    for dtype in ("fp32", "fp16", "bf16"):
        build("tiny", random_weights=0, resolution="64x96", frames=9, dtype=dtype, output=bundle)
    return bundle


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle that a test may change."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.fixture
def config() -> WanConfig:
    """A small T2V."""
    return small_config("t2v-1.3b")


@pytest.fixture(scope="session")
def state() -> dict[str, Tensor]:
    """Its tensors under the official names; a test must not change them."""
    return official_state(diffusers_model(small_config("t2v-1.3b")))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
