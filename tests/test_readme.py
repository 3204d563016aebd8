"""Every command in the README runs as written, in order, in a fresh copy of the tree."""

from pathlib import Path

import pytest

from tests.documents import document
from tests.shown_commands import (
    copy_tree,
    needs_environment,
    offline_environment,
    run,
    run_scripts,
)
from wanexport.runtime import load

README = document("README.md")
# They would run this test again: make only says what it would do. CI runs them.
RUNNING_TESTS = {"make test", "make check"}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme") / "wanexport"
    copy_tree(folder)
    return folder


@needs_environment
def test_every_command_runs(checkout: Path, tmp_path: Path) -> None:
    environment, commands = offline_environment(tmp_path), README.commands("bash")
    assert len(commands) >= 5
    assert RUNNING_TESTS <= set(commands)
    for command in commands:
        command += " --dry-run" if command in RUNNING_TESTS else ""
        run(["bash", "-c", command], checkout, environment)
    assert load(checkout / "t2v").geometry.num_tokens == 32760
    for name in ("clip.mp4", "contact_sheet.png"):
        assert (checkout / "demo" / name).stat().st_size > 0
    (printed,) = run_scripts(README, checkout, environment)
    assert printed.count("\n") == 4
