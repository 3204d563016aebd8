"""`wanexport lint` of a `module:function`, and with --fix of ONNX files too: one record."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from wanexport.exporter.lint.onnx import lint
from wanexport.exporter.lint.program import Finding, count, lint_program
from wanexport.exporter.module_function import is_function
from wanexport.exporter.rewrite.fix_onnx import fix_onnx, weights_beside
from wanexport.exporter.rewrite.fix_program import export_function, fix_program
from wanexport.exporter.rewrite.record import Rewriting
from wanexport.runtime.bundle.durable import check_writable
from wanexport.runtime.errors import BadRequest

_GRAPH, _PROGRAM = ".onnx", ".pt2"


def lint_or_fix(
    target: str,
    *,
    parser: str | None = None,
    fix: bool = False,
    output: Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """What `wanexport lint` does. Raises BadRequest for options that do not go together."""
    if fix != (output is not None):
        raise BadRequest(
            "--fix and -o FILE go together: what is rewritten is written to a new file"
        )
    if overwrite and not fix:
        raise BadRequest("--overwrite goes with --fix and -o FILE")
    is_call = is_function(target) and not Path(target).exists()
    if parser is not None and (fix or is_call):
        raise BadRequest(f"--parser {parser} is for .onnx files and bundles, without --fix")
    if output is not None:
        return rewrite_to(target, output, overwrite=overwrite)
    return lint_function(target) if is_call else lint(target, parser)


def lint_function(target: str) -> dict[str, Any]:
    """Export what `module:function` returns, and lint the program: the record of `lint`.

    Raises BadRequest as `export_function` does.
    """
    return _result(target, lint_program(export_function(target)))


def rewrite_to(target: str, output: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Rewrite a `module:function`'s program, or an ONNX file, and write the result to output.

    The record is that of `lint` for what was written, and has `fix`: the counts of each rule, the
    places left with their reasons, lint's counts before, and how the two were compared. Raises
    WanExportError, with nothing written, for what cannot be rewritten, or when a bit would change.
    """
    path = Path(target)
    if is_function(target) and not path.exists():
        _check_output(output, _PROGRAM, overwrite)
        program = export_function(target)
        before = count(lint_program(program))
        rewriting, after, runs = fix_program(program, output)
        compared = f"bit for bit on {runs} inputs"
        return {**_result(target, after), "fix": _fixed(rewriting, before, compared, output)}
    _check_input(path)
    _check_output(output, _GRAPH, overwrite, path)
    before = _counts(lint(path))
    rewriting, uncompared = fix_onnx(path, output)
    compared = f"with nothing: {uncompared}" if uncompared else "bit for bit in ONNX Runtime"
    result = {**lint(output), "path": target}
    return {**result, "fix": _fixed(rewriting, before, compared, output)}


def _result(name: str, findings: list[Finding]) -> dict[str, Any]:
    """The record of `lint` for one program."""
    graph = {
        "counts": count(findings),
        "findings": [asdict(finding) for finding in findings],
        "recorded": False,
    }
    return {"path": name, "clean": not findings, "graphs": {name: graph}}


def _counts(result: dict[str, Any]) -> dict[str, int]:
    (graph,) = result["graphs"].values()
    return dict(graph["counts"])


def _fixed(
    rewriting: Rewriting, before: dict[str, int], compared: str, output: Path
) -> dict[str, Any]:
    return {
        **rewriting.as_dict(),
        "before": before,
        "compared": compared,
        "output": str(output),
    }


def _check_input(path: Path) -> None:
    """Raise BadRequest for what is not rewritten."""
    if path.suffix.lower() == _PROGRAM:
        raise BadRequest(
            f"{path}: to load a .pt2 file is to run the code in it, so --fix does not: name the "
            f"function that exports the model, as MODULE:FUNCTION"
        )
    if path.is_dir():
        raise BadRequest(f"{path} is a folder: a build leaves nothing to fix in a bundle")
    if not path.exists():
        raise BadRequest(f"{path} does not exist: name an .onnx file or MODULE:FUNCTION")
    if path.suffix.lower() != _GRAPH:
        raise BadRequest(f"{path} is not rewritten: name an .onnx file or MODULE:FUNCTION")


def _check_output(output: Path, suffix: str, overwrite: bool, source: Path | None = None) -> None:
    """Raise BadRequest, before any work, for what could not be written after it."""
    if output.suffix.lower() != suffix or os.path.isdir(output):
        raise BadRequest(f"{output}: what is rewritten goes to a {suffix} file: name one with -o")
    written = [output] if suffix == _PROGRAM else [output, weights_beside(output)]
    if source is not None and output.exists() and output.samefile(source):
        raise BadRequest(f"{output} is the model itself: name another -o")
    for path in written:
        if os.path.lexists(path) and not overwrite:
            raise BadRequest(f"{path} exists: name another -o, or add --overwrite")
    try:
        for path in written:
            check_writable(path)
    except OSError as error:
        raise BadRequest(
            f"cannot write {output} ({error.strerror}): name a file in an existing folder with -o"
        ) from error
