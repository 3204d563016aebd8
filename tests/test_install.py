"""What `make setup` installs, and every extra, can be had from an index alone, for each Python.

uv resolves, since pip would download gigabytes where an index has no metadata beside its packages.
Of pip's settings only the index holds: wheels of this machine's own must not hide a conflict.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.specifiers import Specifier
from packaging.utils import canonicalize_name

from tests.test_packaging import PROJECT, ROOT, requirements

PYTHONS = ("3.11", "3.12", "3.13")
EXTRAS = PROJECT["project"]["optional-dependencies"]


def recipe(target: str, *variables: str) -> list[str]:
    """The words that a target of make gives to pip, or to uv, for the project itself."""
    environment = {name: text for name, text in os.environ.items() if "MAKE" not in name}
    command = ["make", "--dry-run", "--always-make", target, *variables]
    lines = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout.replace("\\\n", " ")
    words = [shlex.split(line) for line in lines.splitlines() if "-e '" in line][-1]
    return [word for word in words[words.index("install") + 1 :] if word != "--quiet"]


def resolve(python: str, words: list[str], folder: Path) -> str:
    """What would be installed. Skips the test where no index can be reached."""
    command = [sys.executable, "-m", "uv", "pip", "install", "--no-config", "--dry-run"]
    settings = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    index = re.findall(r"^\S*\.index-url='(\S+)'$", settings, re.MULTILINE)
    environment = {name: text for name, text in os.environ.items() if not name.startswith("UV_")}
    environment |= {"UV_HTTP_RETRIES": "1"} | ({"UV_DEFAULT_INDEX": index[-1]} if index else {})
    child = subprocess.run(
        [*command, "--python-version", python, "--target", str(folder), *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    if "Failed to fetch" in child.stderr:
        pytest.skip("no package index can be reached")
    assert child.returncode == 0, child.stderr
    return child.stderr


@pytest.mark.parametrize("python", PYTHONS)
def test_what_make_setup_installs_resolves(python: str, tmp_path: Path) -> None:
    found = resolve(python, recipe("setup"), tmp_path)
    assert " + torch==2." in found and " + wanexport" in found


@pytest.mark.parametrize("python", PYTHONS)
def test_all_extras_that_go_together_resolve(python: str, tmp_path: Path) -> None:
    extras = ",".join(sorted(EXTRAS.keys() - {"cpu"}))  # gpu takes its place
    words = ["-c", "constraints.txt", "-e", f".[{extras}]", "--group", "dev"]
    assert " + onnxruntime-gpu==" in resolve(python, words, tmp_path)


def test_the_oldest_versions_allowed_are_what_is_tested(tmp_path: Path) -> None:
    """A bound below what its neighbours allow would be a promise that nobody tests."""
    words = recipe("test-oldest")
    words = words[words.index("--resolution") :]
    found = dict(re.findall(r"^ \+ (\S+)==(\S+)$", resolve("3.11", words, tmp_path), re.MULTILINE))
    assert {"torch", "onnx-ir", "filelock"} <= found.keys()
    for needed in requirements():
        version = found.get(canonicalize_name(needed.name))
        for bound in needed.specifier:
            if version and bound.operator == ">=":
                assert Specifier(f"=={bound.version}.*").contains(version), (needed, version)


def test_the_index_of_pytorchs_cpu_build_can_be_named() -> None:
    assert recipe("setup", "TORCH=file:///some/index")[:2] == [
        "--extra-index-url",
        "file:///some/index",
    ]
    assert "--extra-index-url" not in recipe("setup")
