"""A package that is missing is named with what installs it; a broken one says what ails it."""

import re
import sys
import tomllib
from pathlib import Path

import pytest

from wanexport.runtime.errors import WanExportError, installing, needing_extra, needing_package

ROOT = Path(__file__).parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The source of an installed package `fragile`, for a test to write."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "fragile", raising=False)
    (tmp_path / "fragile").mkdir()
    return tmp_path / "fragile" / "__init__.py"


def refusal(statement: str) -> str:
    with pytest.raises(WanExportError) as error, needing_extra("build,cpu", "this command"):
        exec(statement)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("module", ["no_such_library", "no_such_library.part"])
def test_a_missing_package_is_named_with_what_installs_it_from_a_clone(module: str) -> None:
    assert refusal(f"import {module}") == (
        "this command needs no_such_library; from a clone of wanexport: pip install '.[build,cpu]'"
    )


def test_a_part_of_a_package_that_is_hidden_names_the_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "fragile", None)
    assert "needs fragile; from a clone" in refusal("import fragile.part")


def test_a_missing_package_of_no_extra_is_named_as_its_registry_has_it() -> None:
    with pytest.raises(WanExportError) as error, needing_package("no-such-library", "it"):
        import no_such_library  # type: ignore[import-not-found]  # noqa: F401
    assert str(error.value) == "it needs no_such_library; pip install no-such-library"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("", "cannot import name 'opset23' from 'fragile'"),  # too old
        ("import fragile.opsets", "No module named 'fragile.opsets'"),
        ("raise ImportError('libfoo.so:\\nno such file')", "(libfoo.so: no such file)"),
        ("raise OSError('libcublas.so.13 is missing')", "libcublas.so.13 is missing"),  # as torch's
        (
            "try:\n    raise ImportError('cannot import name X')\n"
            "except ImportError as error:\n    raise RuntimeError('look up') from error",
            "(cannot import name X)",  # as diffusers wraps it
        ),
    ],
)
def test_an_installed_package_that_does_not_import_says_why(
    package: Path, source: str, reason: str
) -> None:
    package.write_text(source)
    message = refusal("from fragile import opset23")
    assert reason in message and message.startswith(
        "this command needs a package that is installed"
    )
    assert "pip install" not in message and "wanexport doctor" in message


def test_what_an_installed_package_lacks_is_named(package: Path) -> None:
    package.write_text("import no_such_library")
    assert "this command needs no_such_library; " in refusal("import fragile")


def test_an_error_of_ours_passes() -> None:
    with pytest.raises(WanExportError, match=r"^as it was$"), needing_extra("cpu", "this"):
        raise WanExportError("as it was")


def test_every_extra_that_the_code_names_is_declared() -> None:
    files = [
        *(ROOT / "runtime").rglob("*.py"),
        *(ROOT / "exporter").rglob("*.py"),
        ROOT / "README.md",
        *(ROOT / "docs").glob("*.md"),
    ]
    text = "\n".join(file.read_text() for file in files)
    named = re.findall(r'needing_extra\(\s*"([a-z,-]+)"|\.\[([a-z,-]+)\]\'', text)
    assert len(named) > 9
    assert {extra for pair in named for part in pair for extra in part.split(",") if extra} <= set(
        EXTRAS
    )


def test_no_message_installs_wanexport_from_a_registry() -> None:
    sources = [file for name in ("runtime", "exporter", "graphs", "samples") for file in
               (ROOT / name).rglob("*.py")]  # fmt: skip
    assert sources
    for file in (*sources, ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        assert not re.search(r"install '?wanexport", file.read_text()), file


def test_requirements_are_quoted_for_a_shell() -> None:
    assert installing("a-b", "c>=1,<2") == "pip install a-b 'c>=1,<2'"


def test_only_the_room_of_errors_says_how_packages_are_installed() -> None:
    wanted = {"runtime/errors.py"}
    saying = set()
    for package in ("runtime", "exporter", "graphs"):
        for file in (ROOT / package).rglob("*.py"):
            if "pip install" in file.read_text():
                saying.add(file.relative_to(ROOT).as_posix())
    assert saying <= wanted
