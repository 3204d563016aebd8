"""`wanexport report`: what a bundle holds and what was measured of it, in one HTML file.

The page needs no network and no other file. It shows what `build`, `compare`, `bench` and `profile`
have found, and runs nothing.
"""

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from wanexport.exporter.bundle.place import REPORTS, check_place
from wanexport.exporter.inspection import inspect
from wanexport.exporter.report.facts import environment, facts_of_bundle, facts_of_engine
from wanexport.exporter.report.saved import KINDS, Saved, read_saved
from wanexport.exporter.report.sections import render, section
from wanexport.runtime.bundle.durable import own_folder, write_durably
from wanexport.runtime.bundle.manifest import EngineRecord, read_manifest
from wanexport.runtime.errors import BadRequest, refuse_empty

PAGE = "report.html"
Engines = Mapping[str, EngineRecord]  # by name


def report(
    bundle: str | Path,
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
    report: str | Path | None = None,
) -> dict[str, Any]:
    """Write the page, and return where it is and how much of each kind it shows.

    output is the file, by default `reports/report.html` of the bundle, which is replaced; another
    that is there only with overwrite. report is the folder where figures are saved, by default the
    bundle's `reports/`. Raises WanExportError when the folder is no bundle, the output cannot be
    written, or a file of figures is damaged.
    """
    refuse_empty(bundle=bundle, output=output, report=report)
    bundle, path = Path(bundle), None if output is None else Path(output)
    if path is not None and os.path.lexists(path) and not overwrite:
        raise BadRequest(f"{path} exists: name another -o, or add --overwrite")
    manifest = read_manifest(bundle)
    engines = {engine.name: engine for engine in manifest.engines}
    saved = read_saved(Path(report) if report is not None else bundle / REPORTS)
    shown = [one for one in saved if _is_shown(one, engines)]
    page = render("page.html.j2", _values(bundle, engines, shown, _words(bundle, path, report)))
    content = page.encode()
    written = _write(bundle, path, content)
    return {
        "bundle": str(bundle),
        "page": str(written),
        "bytes": len(content),
        "engines": list(engines),
        "shown": {kind: sum(one.kind == kind for one in shown) for kind in KINDS},
        "left_out": [str(one.path) for one in saved if one not in shown],
    }


def _is_shown(saved: Saved, engines: Engines) -> bool:
    """Whether it is of an engine that is there, or of PyTorch alone."""
    return saved.engine in engines or (saved.engine is None and saved.kind == "profile")


def _write(bundle: Path, path: Path | None, content: bytes) -> Path:
    """Write the page, in the bundle where no other place is named."""
    if path is None:
        check_place(bundle)
        path = own_folder(bundle, REPORTS) / PAGE
    elif not path.parent.is_dir():
        raise BadRequest(f"cannot write {path}: {path.parent} is no folder")
    write_durably(path, content)
    return path


def _words(bundle: Path, path: Path | None, report: str | Path | None) -> str:
    """The command that writes this page."""
    words = ["wanexport", "report", str(bundle)]
    words += [] if path is None else ["-o", str(path)]
    return shlex.join([*words, *([] if report is None else ["--report", str(report)])])


def _values(
    bundle: Path, engines: Engines, shown: Sequence[Saved], written_by: str
) -> dict[str, Any]:
    """What the page's template takes."""
    held = inspect(bundle)
    described = {engine["name"]: engine for engine in held["engines"]}

    def sections(of: EngineRecord | None) -> list[Markup]:
        name = None if of is None else of.name
        own = sorted((one for one in shown if one.engine == name), key=_order)
        return [section(one, str(bundle), of) for one in own]

    return {
        "bundle": facts_of_bundle(held),
        "engines": [
            {**facts_of_engine(described[name]), "sections": sections(engine)}
            for name, engine in engines.items()
        ],
        "others": sections(None),
        "environment": environment(),
        "written_by": written_by,
    }


def _order(saved: Saved) -> int:
    return KINDS.index(saved.kind)
