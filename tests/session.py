"""Bundles that many tests read; each is built once a session, by the product itself.

`make test` runs two files at a time, each in one of two processes.
"""

import gc
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.examined import examine_once
from tests.forked import Forks
from tests.locked import locked
from tests.onnx_library import read_once
from tests.oracles.wan_reference import diffusers_model, official_state, small_config
from tests.traced import trace_once
from tests.translated import translate_once
from tests.unsynced import spare_the_disk
from wanexport.exporter.build import build
from wanexport.exporter.child import child
from wanexport.exporter.child.process import run_command
from wanexport.runtime.wan_config import WanConfig

LONGEST = (
    "test_readme",
    "test_aoti",
    "test_to_tensorrt",
    "test_build",
    "test_bench",
    "test_run",
    "test_compare",
    "test_bisect",
    "test_docs_run",
    "test_proofs",
    "test_doctor",
    "test_vae_engine",
    "test_tiny_wan",
    "test_diffusers_pipeline",
    "test_onnx_cuda",
    "test_cli",
    "test_sets",
    "test_polygraphy_io",
    "test_samples",
    "test_pipeline",
    "test_onnx_causal",
    "test_to_onnx",
    "test_install",
)


def pytest_configure() -> None:
    """Give processes of tests, and what they start, a core each; and spare compilers a trial."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Every process of a build would compile a program for each vector instruction set of this CPU.
    os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
    spare_the_disk()


def pytest_collection_finish() -> None:
    """Look no more for garbage among all that was imported, and seldom among what tests make.

    A trace makes a million objects that are kept, and a sixth of its time would go into the search.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files, lest one be left for the end; skip GPU tests without a GPU."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that both processes see."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def forks(shared_folder: Path) -> Forks:
    """Runs children of builds, and commands, as forks."""
    return Forks(shared_folder)


@pytest.fixture(scope="session", autouse=True)
def nothing_twice(shared_folder: Path, forks: Forks) -> None:
    """PyTorch's library of ONNX is read once, and no call of a graph is translated twice.

    Nor is a package compiled twice, or a library imported for doctor. Not beside a GPU, which forks
    of one process cannot use.
    """
    read_once()
    trace_once()
    translate_once(shared_folder)
    examine_once(shared_folder)
    if not torch.cuda.is_available():
        child.run_command = forks.run_command  # type: ignore[attr-defined]


@pytest.fixture
def fresh_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children are processes of their own, as a user's are: for tests that are about them."""
    monkeypatch.setattr(child, "run_command", run_command)


@pytest.fixture(scope="session")
def tiny_bundle(shared_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny preset at 64x96x9 in fp32, fp16 and bf16; built for both processes, a copy each."""
    with locked(shared_folder / "tiny.lock"):
        for dtype in ("fp32", "fp16", "bf16"):
            build(
                "tiny", random_weights=0, resolution="64x96", frames=9, dtype=dtype,
                output=shared_folder / "tiny",
            )  # fmt: skip
    return Path(
        shutil.copytree(shared_folder / "tiny", tmp_path_factory.mktemp("bundles") / "tiny")
    )


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
