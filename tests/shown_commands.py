"""Run what README and docs/ show, in a fresh copy of the tree, as a reader would.

Commands in ```bash blocks need neither a GPU nor the network, and run; those in ```sh blocks do,
and are only parsed. Scripts in ```python blocks run after the commands of their page; those in
```py blocks are only read.
"""

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.documents import ROOT, Document
from tests.forked import Forks
from tests.oracles.wan_reference import (
    diffusers_model,
    official_state,
    small_config,
    write_official,
)
from tests.test_packaging import tracked

HUB_MODEL = "models--Wan-AI--Wan2.1-T2V-1.3B"
needs_environment = pytest.mark.skipif(
    not (ROOT / ".venv").exists(), reason="runs in the environment of make setup"
)


def copy_tree(folder: Path) -> None:
    """Write the tree as a clone has it, with the environment that `make setup` made."""
    for name in tracked("*"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    stamp = ROOT / ".venv" / ".ready"
    sources = [ROOT / "pyproject.toml", ROOT / "constraints.txt"]
    if any(source.stat().st_mtime > stamp.stat().st_mtime for source in sources):
        pytest.skip("the environment is older than its sources: run make setup")
    (folder / ".venv").symlink_to(ROOT / ".venv")


def offline_environment(hub: Path) -> dict[str, str]:
    """No network: the hub's cache holds a small checkpoint under the default model's id."""
    config = small_config("t2v-1.3b", num_layers=1)
    snapshot = hub / HUB_MODEL / "snapshots" / "0123456789"
    write_official(snapshot, official_state(diffusers_model(config)), config)
    (hub / HUB_MODEL / "refs").mkdir()
    (hub / HUB_MODEL / "refs" / "main").write_text("0123456789")
    return {
        **os.environ,
        "PATH": f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}",
        "HF_HUB_CACHE": str(hub),
        "HF_HUB_OFFLINE": "1",
    }


@dataclass(frozen=True)
class Reader:
    """Who runs what a page shows: in a folder, with an environment.

    With forks, a command that is one program alone is a fork; without, all are run by a shell.
    """

    folder: Path
    environment: dict[str, str]
    forks: Forks | None = None

    def run(self, line: str) -> str:
        """Run a command, and return what it prints; another exit code than 0 fails the test."""
        words = shlex.split(line)
        is_program = words[0] == "wanexport" or (words[:1] == ["python"] and words[1][-3:] == ".py")
        if self.forks and is_program and not set(line) & set("|&;<>$`*?"):
            ended = self.forks.run_program(words, self.folder, self.environment)
            return _printed(line, ended.code, ended.output, ended.errors)
        return self._run(["bash", "-c", line])

    def run_scripts(self, page: Document) -> list[str]:
        """Run a page's scripts, and return what each prints."""
        return [self._run(["python", "-c", script]) for script in page.blocks("python")]

    def _run(self, command: Sequence[str]) -> str:
        child = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True
        )
        return _printed(" ".join(command), child.returncode, child.stdout, child.stderr)


def _printed(command: str, code: int, output: str, errors: str) -> str:
    assert code == 0, f"{command}\n{output}\n{errors}"
    return output
