"""Wheel and sdist hold every module, and no folder of the tree is forgotten."""

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from itertools import chain
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NOT_SHIPPED = {"tests", "samples"}  # top-level folders


def tracked(pattern: str) -> list[str]:
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", pattern],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return listing.stdout.split()


def test_every_folder_with_code_is_mapped() -> None:
    folders = {Path(name).parent for name in tracked("*.py")}
    shipped = {folder for folder in folders if folder.parts[0] not in NOT_SHIPPED}
    packages = {".".join(("wanexport", *folder.parts)) for folder in shipped}
    assert packages == set(PROJECT["tool"]["setuptools"]["packages"])
    tops = {folder.parts[0] for folder in shipped}
    mapping = PROJECT["tool"]["setuptools"]["package-dir"]
    assert mapping == {f"wanexport.{top}": top for top in tops}


def test_wheel_and_sdist_hold_every_module(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in tracked("*"):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [
            sys.executable,
            "-m",
            "build",
            "--wheel",
            "--sdist",
            "--no-isolation",
            "--outdir",
            str(tmp_path),
            str(source),
        ],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info" not in name}
    folders = PROJECT["tool"]["setuptools"]["package-dir"].values()
    expected = {name for folder in folders for name in tracked(f"{folder}/*")}
    assert names == {f"wanexport/{name}" for name in expected}
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert expected <= inside


def requirements() -> list[Requirement]:
    """Of the project, its extras and its development groups."""
    project, groups = PROJECT["project"], PROJECT["dependency-groups"]
    lists = [project["dependencies"], *project["optional-dependencies"].values(), *groups.values()]
    return [Requirement(text) for text in chain(*lists) if isinstance(text, str)]


def test_constraints_pin_what_the_project_names() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    for requirement in requirements():
        assert requirement.name in pins, requirement
        assert requirement.specifier.contains(pins[requirement.name]), requirement


def test_what_the_project_installs_has_a_lower_bound() -> None:
    """`make test-oldest` tests it; without one, it would be a version of years ago."""
    for requirement in requirements():
        bounds = [part for part in requirement.specifier if part.operator == ">="]
        assert len(bounds) == 1 or requirement.name in {"mypy", "ruff"}, requirement
