"""Run every section of docs/published_optimisations.md, and write what they measured into the page.

    python -m tests.tables.published_all [--device cuda] [--out FILE.json] [SECTION ...]
    python -m tests.tables.published_all --write FILE.json docs/published_optimisations.md

Each section is a process of its own with a time limit. A table is printed as its section ends, and
FILE.json is written again then, so that a run that is cut keeps what it has. Without a FILE in
`--write`, which is `-`, the tables are only laid out anew.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from threading import Timer
from typing import Any

from tests.tables.published.page import COLUMNS, filled, table
from tests.tables.published.section import Section

LIMITS = {  # seconds of each section on a GPU; what is quick first, what builds an engine last
    "machine": 40.0,
    "helios": 60.0,
    "host_waits": 80.0,
    "inplace_rotary": 80.0,
    "rope": 120.0,
    "compiled_norms": 200.0,
    "persistent": 180.0,
}
NAMES = tuple(LIMITS)
ON_A_CPU = 20  # times as long


def section(name: str) -> Section:
    """A section by its name."""
    found: Section = import_module(f"tests.tables.published.{name}").SECTION
    return found


def limit_of(name: str, device: str) -> float:
    """Seconds that a section may take on a device."""
    return LIMITS[name] * (ON_A_CPU if device == "cpu" else 1)


def run(name: str, device: str, folder: Path, limit: float) -> dict[str, Any]:
    """A section's cells, how long it took, and how its process ended."""
    command = [sys.executable, "-m", f"tests.tables.published.{name}", "--json"]
    command += ["--device", device, "--folder", str(folder)]
    started = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    timer = Timer(limit, os.killpg, (child.pid, signal.SIGKILL))
    timer.start()
    assert child.stdout is not None
    cells = dict(pair for line in child.stdout if (pair := _pair(line)))
    code = child.wait()
    timer.cancel()
    seconds = round(time.monotonic() - started, 1)
    ended = {0: "done", -signal.SIGKILL: f"cut after {seconds} s"}.get(code, f"exit code {code}")
    return {"cells": cells, "seconds": seconds, "ended": ended}


def _pair(line: str) -> tuple[str, str] | None:
    """A line of a section, or None for one that a library printed."""
    try:
        label, cell = json.loads(line)
    except (ValueError, TypeError):
        return None
    return str(label), str(cell)


def save(record: dict[str, Any], file: Path) -> None:
    """Write a record in one piece."""
    scratch = file.with_suffix(".part")
    scratch.write_text(json.dumps(record, indent=1) + "\n")
    scratch.replace(file)


def run_all(
    names: Sequence[str], device: str, out: Path | None, folder: Path, limit: float | None
) -> int:
    """Run sections one after the other; the number of those that did not end by themselves."""
    record: dict[str, Any] = {"device": device, "sections": {}}
    for name in names:
        told = run(name, device, folder, limit or limit_of(name, device))
        record["sections"][name] = told
        if out is not None:
            save(record, out)
        print(f"\n{name}: {told['ended']}, {told['seconds']} s\n", flush=True)
        print(table(section(name), {COLUMNS[device]: told["cells"]}), flush=True)
    return sum(told["ended"] != "done" for told in record["sections"].values())


def write(file: str, page: Path) -> None:
    """Fill the tables of a page from a record."""
    record = {} if file == "-" else json.loads(Path(file).read_text())
    known = {name: section(name) for name in NAMES}
    page.write_text(filled(page.read_text(), known, record))


def main(words: Sequence[str] | None = None) -> None:
    """Read the command line; exit with 1 when a section did not end by itself."""
    parser = argparse.ArgumentParser(prog="python -m tests.tables.published_all")
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(NAMES))
    parser.add_argument("--device", choices=list(COLUMNS), default="cpu")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--folder", type=Path, help="for models and bundles; a temporary one")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="of each section")
    parser.add_argument("--write", nargs=2, metavar=("FILE.json", "PAGE"))
    given = parser.parse_args(words)
    if unknown := set(given.sections) - set(NAMES):
        parser.error(f"no section is called {', '.join(sorted(unknown))}: {', '.join(NAMES)} are")
    if given.write:
        write(given.write[0], Path(given.write[1]))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        failed = run_all(given.sections or NAMES, given.device, given.out, folder, given.limit)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
