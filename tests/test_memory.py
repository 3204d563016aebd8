"""Memory figures are in bytes and in order, and every control group's limit counts."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from wanexport.runtime import memory


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A control group within another, that this process is taken to be in."""
    inner = tmp_path / "slice" / "job"
    inner.mkdir(parents=True)
    monkeypatch.setattr(memory, "_control_groups", lambda: (inner, tmp_path / "slice"))
    yield inner


def test_figures_are_in_bytes_and_in_order() -> None:
    block = np.ones(1 << 24)  # 128 MiB, touched
    assert block.nbytes < memory.peak_rss() < memory.limit_bytes()
    assert 0 < memory.available_bytes() <= memory.limit_bytes()


def test_a_control_group_without_a_limit_changes_nothing(group: Path) -> None:
    limit = memory.limit_bytes()
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("1048576\n")
    assert memory.limit_bytes() == limit


@pytest.mark.parametrize("outer", [False, True])
def test_the_limit_of_any_control_group_counts_with_its_use(group: Path, outer: bool) -> None:
    folder = group.parent if outer else group
    (folder / "memory.max").write_text("8388608\n")
    (folder / "memory.current").write_text("1048576\n")
    assert memory.limit_bytes() == 8 << 20
    assert memory.available_bytes() == 7 << 20


def test_this_process_has_control_groups_or_none() -> None:
    assert all(folder.is_dir() for folder in memory._control_groups())
