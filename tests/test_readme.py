"""Every command in the README runs as written, in order, in a fresh copy of the tree."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.oracles.wan_reference import (
    diffusers_model,
    official_state,
    small_config,
    write_official,
)
from tests.test_packaging import ROOT, tracked
from wanexport.runtime import load
from wanexport.runtime.bundle.tensorfile import load_arrays

README = (ROOT / "README.md").read_text()
HUB_MODEL = "models--Wan-AI--Wan2.1-T2V-1.3B"
# They would run this test again: make only says what it would do. CI runs them.
RUNNING_TESTS = ("make test", "make check")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree as a clone has it, with the environment that `make setup` made."""
    folder = tmp_path_factory.mktemp("readme") / "wanexport"
    for name in tracked("*"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    stamp = ROOT / ".venv" / ".ready"
    sources = [ROOT / "pyproject.toml", ROOT / "constraints.txt"]
    if any(source.stat().st_mtime > stamp.stat().st_mtime for source in sources):
        pytest.skip("the environment is older than its sources: run make setup")
    (folder / ".venv").symlink_to(ROOT / ".venv")
    return folder


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """No network: the hub's cache holds a small checkpoint under the default model's id."""
    hub = tmp_path_factory.mktemp("hub")
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


@pytest.mark.skipif(not (ROOT / ".venv").exists(), reason="runs in the environment of make setup")
def test_every_command_runs(checkout: Path, environment: dict[str, str]) -> None:
    commands = [line for block in blocks("bash") for line in block.splitlines()]
    assert len(commands) >= 9
    assert set(RUNNING_TESTS) <= set(commands)
    for command in commands:
        command += " --dry-run" if command in RUNNING_TESTS else ""
        child = subprocess.run(
            ["bash", "-c", command], cwd=checkout, env=environment, capture_output=True, text=True
        )
        assert child.returncode == 0, f"{command}\n{child.stdout}\n{child.stderr}"
    assert load(checkout / "t2v").geometry.num_tokens == 32760
    for name in ("clip.mp4", "contact_sheet.png"):
        assert (checkout / "demo" / name).stat().st_size > 0
    assert load_arrays(checkout / "text.safetensors")["text"].shape == (77, 4096)
    assert load_arrays(checkout / "latents.safetensors")["latent"].shape[2] == 3
    for script in blocks("python"):
        child = subprocess.run(
            ["python", "-c", script], cwd=checkout, env=environment, capture_output=True, text=True
        )
        assert child.returncode == 0, child.stderr
        assert child.stdout.count("\n") == 4


def test_every_linked_file_exists() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert links
    assert all((ROOT / link).exists() for link in links)


def test_no_figure_is_left_open() -> None:
    prose = re.sub(r"`[^`]*`", "", README)  # names of variables stand in code
    assert not re.findall(r"\b[A-Z]+_[A-Z_]+\b", prose)
