"""A fork of a child is to its parent what a fresh process is."""

import os
import sys
from pathlib import Path

import pytest

from tests.documents import ROOT
from tests.forked import Forks
from wanexport.exporter.child.process import run_command


@pytest.mark.parametrize("content", ['{"a": 1}', "{"])
def test_a_fork_ends_and_prints_as_a_fresh_process(
    content: str, forks: Forks, tmp_path: Path
) -> None:
    (tmp_path / "job").write_text(content)
    command = [sys.executable, "-P", "-m", "json.tool", str(tmp_path / "job")]
    assert forks.run_command(command) == run_command(command)
    lines: dict[str, list[str]] = {"fork": [], "fresh": []}
    ended = forks.run_command(command, on_line=lines["fork"].append)
    assert ended == run_command(command, on_line=lines["fresh"].append)
    assert lines["fork"] == lines["fresh"]


def test_a_fork_sees_its_own_environment_and_nothing_that_a_test_changed(
    forks: Forks, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-P", "-m", "tests.said", "TMPDIR"]
    monkeypatch.setattr("tests.said.SUFFIX", " of the test")
    environment = {**os.environ, "TMPDIR": "/nowhere"}
    assert forks.run_command(command, environment=environment).output == "/nowhere\n"


def test_a_fork_that_takes_too_long_is_stopped(forks: Forks) -> None:
    with pytest.raises(TimeoutError, match="was stopped"):
        forks.run_command([sys.executable, "-P", "-m", "tests.said", "sleep"], timeout=0.5)


def test_other_settings_make_a_fresh_process(forks: Forks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forks, "_fork", lambda *_: pytest.fail("it was forked"))
    command = [sys.executable, "-P", "-m", "tests.said", "CXX"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CXX": "other"}
    assert forks.run_command(command, environment=environment).output == "other\n"
