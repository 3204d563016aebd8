"""What `make setup` installs, and every extra, can be had from an index alone, for each Python.

uv resolves, since pip would download gigabytes where an index has no metadata beside its packages.
Of pip's settings only the index holds: wheels of this machine's own must not hide a conflict.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
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


def index_of_pip() -> list[str]:
    """Where pip is set to look, if it is."""
    settings = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    return re.findall(r"^\S*\.index-url='(\S+)'$", settings, re.MULTILINE)


def resolve(python: str, words: list[str], index: list[str], folder: Path) -> str:
    """What would be installed. Skips the test where no index can be reached."""
    command = [sys.executable, "-m", "uv", "pip", "install", "--no-config", "--dry-run"]
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


@pytest.fixture(scope="module")
def resolved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, str], str]]:
    """What would be installed, by what for and Python; asked at once, as uv waits for the index."""
    extras = ",".join(sorted(EXTRAS.keys() - {"cpu"}))  # gpu takes its place
    oldest = recipe("test-oldest")
    words = {
        "setup": recipe("setup"),
        "extras": ["-c", "constraints.txt", "-e", f".[{extras}]", "--group", "dev"],
        "oldest": oldest[oldest.index("--resolution") :],
    }
    index = index_of_pip()
    asked = [(name, python) for name in ("setup", "extras") for python in PYTHONS]
    with ThreadPoolExecutor(len(asked) + 1) as pool:
        found = {
            (name, python): pool.submit(
                resolve, python, words[name], index, tmp_path_factory.mktemp("target")
            )
            for name, python in (*asked, ("oldest", PYTHONS[0]))
        }
        yield lambda name, python: found[name, python].result()


@pytest.mark.parametrize("python", PYTHONS)
def test_what_make_setup_installs_resolves(
    python: str, resolved: Callable[[str, str], str]
) -> None:
    found = resolved("setup", python)
    assert " + torch==2." in found and " + wanexport" in found


@pytest.mark.parametrize("python", PYTHONS)
def test_all_extras_that_go_together_resolve(
    python: str, resolved: Callable[[str, str], str]
) -> None:
    assert " + onnxruntime-gpu==" in resolved("extras", python)


def test_the_oldest_versions_allowed_are_what_is_tested(
    resolved: Callable[[str, str], str],
) -> None:
    """A bound below what its neighbours allow would be a promise that nobody tests."""
    lines = resolved("oldest", PYTHONS[0])
    found = dict(re.findall(r"^ \+ (\S+)==(\S+)$", lines, re.MULTILINE))
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
