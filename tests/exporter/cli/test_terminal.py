"""What strangers wrote is shown as it is: no markup, no control character, one line."""

import io
import json
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.quick import slow_but
from tests.runtime.bundle.small_bundle import change, manifest_of, put, small_bundle
from wanexport.exporter.cli import display_bundle, terminal
from wanexport.exporter.cli.main import main
from wanexport.exporter.inspection import inspect
from wanexport.runtime.errors import printable

HOSTILE = ("[/bold]", "[red]x", ":warning:", "\x1b[2J", "a\nb", "a\u202eb", "\r", "\0", "\ud800")
IN_FIELDS = ("[/bold]", "\x1b[2J", "a\nb")


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What is printed, as on a terminal that takes colours."""
    stream = io.StringIO()
    console = Console(
        file=stream, soft_wrap=True, highlight=False, markup=False, emoji=False, width=300
    )
    for module in (display_bundle, terminal):
        monkeypatch.setattr(module, "out", console)
    return stream


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain ~ text, 480x832 \\ [bold]", "plain ~ text, 480x832 \\ [bold]"),
        ("a\nb\r\n", "a\\nb\\r\\n"),
        ("\x1b[2J\x07\x9b", "\\x1b[2J\\x07\\x9b"),
        ("a\u202eb\u2066\u2028", "a\\u202eb\\u2066\\u2028"),
        ("\udcff\ud800\0", "\\udcff\\ud800\\x00"),
        ("r\u00e9sum\u00e9 \u4e2d\u6587", "r\u00e9sum\u00e9 \u4e2d\u6587"),
    ],
)
def test_what_is_not_printable_is_escaped(text: str, expected: str) -> None:
    assert printable(text) == expected


def test_a_long_text_keeps_its_start_and_its_end() -> None:
    cut = printable("start" + "x" * 10**7 + "the cure", 100)
    assert len(cut) == 100 and cut.startswith("startx") and cut.endswith("xthe cure")
    assert len(printable("\x1b" * 10**6)) <= 2000


@pytest.mark.parametrize("text", [*HOSTILE, "\\", "[", "[/", "\\[/bold]", "[@click=x]y[/]"])
def test_a_line_is_written_as_it_is(text: str, shown: io.StringIO) -> None:
    terminal.write(terminal.out, (text, "bold"), ": ", text)
    assert shown.getvalue() == f"{printable(text)}: {printable(text)}\n"


def strings(data: Any, place: str = "") -> list[str]:
    """Where the manifest has strings."""
    if isinstance(data, str):
        return [place.strip(".")]
    pairs = (
        data.items() if isinstance(data, dict) else enumerate(data if type(data) is list else ())
    )
    return [found for key, value in pairs for found in strings(value, f"{place}.{key}")]


@pytest.mark.parametrize("text", slow_but(IN_FIELDS, IN_FIELDS[0]))
def test_no_text_of_a_manifest_is_markup_or_moves_the_cursor(
    text: str, tmp_path: Path, shown: io.StringIO
) -> None:
    bundle = small_bundle(tmp_path / "bundle", "onnx", "aoti", "tensorrt")
    whole, seen = manifest_of(bundle), 0
    for place in [p for p in strings(whole) if ".parameters." not in p]:
        put(bundle, whole)
        change(bundle, place, text)
        try:
            record = inspect(bundle)
        except ValueError as error:
            assert str(error).isprintable(), place
            continue
        shown.seek(0)
        shown.truncate(0)
        display_bundle.show_inspect(record)
        json.dumps(record)
        lines = shown.getvalue().split("\n")
        assert all(line.isprintable() for line in lines), (place, text)
        assert all(len(problem) < 3000 for problem in record["problems"])
        seen += 1
    assert seen > 6  # many fields take any text


@pytest.mark.parametrize("text", IN_FIELDS)
@pytest.mark.parametrize("command", ["inspect", "lint", "run", "bench", "compare"])
def test_an_error_is_one_line_of_printable_text(
    command: str,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    bundle = change(small_bundle(tmp_path / text), "weights.fp32.dtype", text)
    options = {"run": ["--text", "x", "-o", "x.safetensors"]}.get(command, [])
    monkeypatch.setattr(sys, "argv", ["wanexport", command, str(bundle), *options])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as left:
        main()
    shown = capfd.readouterr()
    assert left.value.code == 2 and shown.out == ""
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1
    assert shown.err.strip().isprintable() and "is damaged" in shown.err
