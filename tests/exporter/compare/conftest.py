"""The bundle of a checkpoint, which tests of `compare` alter."""

import shutil
from pathlib import Path

import pytest

from tests.tables import faults


@pytest.fixture(scope="session")
def built_from_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, `model`, and its bundle in fp32 and fp16, `bundle`."""
    folder = tmp_path_factory.mktemp("checkpoint")
    faults.make_bundle(folder)
    return folder


@pytest.fixture
def converted(built_from_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of that bundle beside its checkpoint."""
    return Path(shutil.copytree(built_from_checkpoint, tmp_path / "copy")) / "bundle"
