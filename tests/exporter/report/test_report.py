"""A report shows what was saved, whole and escaped, and refuses what is none of ours."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.exporter.report.saved_figures import BENCH, PROFILE
from wanexport.exporter.cli.main import cli
from wanexport.exporter.compare.compare import compare
from wanexport.exporter.report.report import report
from wanexport.runtime.bundle.manifest import read_manifest
from wanexport.runtime.errors import BadRequest, WanExportError

VOID = {"meta", "br", "path", "rect", "circle"}


class Page(HTMLParser):
    """The text of a page, its commands, and what it would load; its elements must be closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text, self.commands, self.loaded, self._open = "", [""], [], list[str]()
        source = path.read_text()
        self.feed(source)
        self.close()
        assert not self._open
        self.loaded += re.findall(r"@import|url\([^)]*\)", source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self._open.append(tag)
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag == "script":
            self.loaded.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:  # of SVG, closed at once
            return
        assert self._open.pop() == tag
        if tag == "code":
            self.commands.append("")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._open[-1:] == ["code"]:
            self.commands[-1] += data


@pytest.fixture(scope="module")
def compared(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose engine in fp32 was compared; tests write elsewhere."""
    bundle = tmp_path_factory.mktemp("compared") / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    compare(bundle, dtype="fp32", steps=2, bisect=True)
    return bundle


@dataclass(frozen=True)
class Measured:
    """A bundle, and a folder of a test's own with figures of each kind."""

    bundle: Path
    folder: Path

    @property
    def page(self) -> Path:
        return self.folder / "page.html"

    def report(self) -> dict[str, Any]:
        return report(self.bundle, output=self.page, report=self.folder)


@pytest.fixture
def measured(compared: Path, tmp_path: Path) -> Measured:
    folder = tmp_path / "figures"
    shutil.copytree(compared / "reports", folder)
    for name, figures in (("bench-x", BENCH), ("profile-x", PROFILE)):
        (folder / f"{name}.json").write_text(json.dumps(figures))
    return Measured(compared, folder)


def test_the_page_has_the_figures_and_needs_nothing_else(measured: Measured) -> None:
    record, page = measured.report(), Page(measured.page)
    assert record["shown"] == {"compare": 1, "bench": 1, "profile": 1}
    assert not page.loaded and not record["left_out"]
    (saved,) = measured.folder.glob("compare-*.json")
    found = json.loads(saved.read_text())
    for row in (*found["steps"], *found["bisect"]["calls"]):
        assert f"{row['error']:.1e}" in page.text
    for engine in read_manifest(measured.bundle).engines:
        assert f"{engine.proof['error']:.1e}" in page.text and engine.name in page.text
    told = (found["bisect"]["verdict"], "30 ms", "50.0 %", "7.5e-07", "model.py:12", "a note",
            "1.2 GFLOPs", "No host_sync, complex", "random weights of tiny, seed 0")  # fmt: skip
    for words in told:
        assert words in page.text, words


def test_what_strangers_wrote_is_text(measured: Measured) -> None:
    measured.report()
    page = Page(measured.page)
    for words in ("a <b>machine</b>", "no compiler & no luck", "void kernel<float, 4>"):
        assert words in page.text


def test_the_commands_of_a_page_are_commands_and_repeat_it(measured: Measured) -> None:
    measured.report()
    commands = [shlex.split(command) for command in Page(measured.page).commands if command]
    assert [words[1] for words in commands] == ["compare", "bench", "profile", "report"]
    for _, name, *words in commands:
        cli.commands[name].make_context(name, words)
    (saved,) = measured.folder.glob("compare-*.json")
    before = json.loads(saved.read_text())
    again = measured.folder / "again"
    result = CliRunner().invoke(cli, [*commands[0][1:], "--report", str(again)])
    assert result.exit_code == 0, result.output
    after = json.loads((again / saved.name).read_text())
    for part in ("steps", "bisect", "engine", "reference", "inputs"):
        assert after[part] == before[part]


def test_an_engine_that_was_built_again_is_told(measured: Measured, bundle: Path) -> None:
    """The manifest of the other bundle notes no comparison."""
    report(bundle, report=measured.folder)
    assert "may have been built again" in Page(bundle / "reports" / "report.html").text
    measured.report()
    assert "may have been built again" not in Page(measured.page).text


def test_figures_of_an_engine_that_is_gone_are_left_out(measured: Measured) -> None:
    gone = {**BENCH, "engine": "32x32x1/onnx-fp32"}
    (measured.folder / "bench-y.json").write_text(json.dumps(gone))
    record = measured.report()
    assert record["left_out"] == [str(measured.folder / "bench-y.json")]
    assert record["shown"]["bench"] == 1


def test_a_bundle_of_which_nothing_was_measured_has_a_page(bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "page.html"
    result = CliRunner().invoke(cli, ["report", str(bundle), "-o", str(output)])
    assert result.exit_code == 0, result.output
    assert "3 engines; figures: 0 of compare, 0 of bench, 0 of profile" in result.stdout
    assert Page(output).text.count("Nothing was compared") == 3
    assert not (bundle / "reports").exists()


def test_a_page_that_is_there_is_kept_but_with_overwrite(bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "page.html"
    output.write_text("mine")
    with pytest.raises(BadRequest, match=r"exists: name another -o, or add --overwrite"):
        report(bundle, output=output)
    assert output.read_text() == "mine"
    report(bundle, output=output, overwrite=True)
    assert Page(output).text
    with pytest.raises(BadRequest, match="no is no folder"):
        report(bundle, output=tmp_path / "no" / "page.html")


def _without(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda result: {key: value for key, value in result.items() if key != name}


@pytest.mark.parametrize("kind", ["compare", "bench", "profile"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda result: "{",
        lambda result: [result],
        lambda result: {"engine": result["engine"]},
        lambda result: {**result, "steps": "x", "arms": 3, "largest": [1]},
        _without("weights"),
    ],
)
def test_what_no_command_saved_is_one_line_and_leaves_no_page(
    kind: str, damage: Callable[[dict[str, Any]], Any], measured: Measured
) -> None:
    (path,) = measured.folder.glob(f"{kind}-*.json")
    damaged = damage(json.loads(path.read_text()))
    path.write_text(damaged if isinstance(damaged, str) else json.dumps(damaged))
    with pytest.raises(WanExportError) as caught:
        measured.report()
    told = f"{path} is not what wanexport {kind} saves ("
    assert str(caught.value).startswith(told) and "\n" not in str(caught.value)
    assert str(caught.value).endswith("): run it again, or remove the file")
    assert not measured.page.exists()


def test_traces_and_other_files_are_not_read(measured: Measured) -> None:
    for name in ("profile-x.trace.json", "mine.json", "notes.txt"):
        (measured.folder / name).write_text("{")
    assert measured.report()["shown"]["profile"] == 1
