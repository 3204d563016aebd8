"""Memory figures are in bytes and in order, and the control group's limit counts."""

import sys
from pathlib import Path

import numpy as np
import pytest

from wanexport.runtime import memory


def test_figures_are_in_bytes_and_in_order() -> None:
    block = np.ones(1 << 24)  # 128 MiB, touched
    assert block.nbytes < memory.peak_rss() < memory.limit_bytes()
    assert 0 < memory.available_bytes() <= memory.limit_bytes()


@pytest.mark.parametrize(("text", "limit"), [("1048576\n", 1 << 20), ("max\n", None)])
def test_the_control_group_limits(
    text: str, limit: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlimited = memory.limit_bytes.__wrapped__
    (tmp_path / "memory.max").write_text(text)
    monkeypatch.setattr(sys.modules[memory.__name__], "_CGROUP_LIMITS", ())
    machine = unlimited()
    monkeypatch.setattr(memory, "_CGROUP_LIMITS", (str(tmp_path / "memory.max"), "/nowhere"))
    assert unlimited() == (limit or machine)
