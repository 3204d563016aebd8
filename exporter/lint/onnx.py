"""`wanexport lint`: what a graph must not contain, in ONNX files, exported programs and bundles."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx

from wanexport.exporter.lint.archive import lint_program_file
from wanexport.exporter.lint.onnx_expansion import check_expansion
from wanexport.exporter.lint.onnx_graph import lint_onnx
from wanexport.exporter.lint.program import Finding, count
from wanexport.exporter.lint.tensorrt import KIND, lint_tensorrt
from wanexport.graphs.signature import attention_count
from wanexport.runtime.bundle.check import check_content
from wanexport.runtime.bundle.manifest import EngineRecord, read_manifest
from wanexport.runtime.bundle.regular_file import read_regular
from wanexport.runtime.errors import BadRequest, BundleError, WanExportError, first_line
from wanexport.runtime.program import WHOLE

_GRAPH = ".onnx"
_MOST_BYTES = 256 << 20  # of a graph without weights, whose largest here has a tenth of it


def lint(path: str | Path, parser: str | None = None) -> dict[str, Any]:
    """Lint every engine of a bundle, an ONNX file, or a `.pt2` of `torch.export.save`.

    With parser `tensorrt`, ONNX graphs must also be what that parser takes. The result has `clean`,
    and for each graph its counts by kind and its findings; of machine code, those that its build
    counted in the graph it was made of, which is then `recorded`. No file is run or unpickled.
    Raises WanExportError when the path is none of these, or damaged.
    """
    path = Path(path)
    graphs = dict(_lint_path(path, parser))
    clean = not any(sum(graph["counts"].values()) for graph in graphs.values())
    return {"path": str(path), "clean": clean, "graphs": graphs}


def _graph(findings: list[Finding], parser: str | None = None) -> dict[str, Any]:
    own = {} if parser is None else {parser: sum(f.kind == parser for f in findings)}
    counts = {**count(findings), **own}
    return {"counts": counts, "findings": [asdict(f) for f in findings], "recorded": False}


def _lint_path(path: Path, parser: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.is_dir():
        for engine in read_manifest(path).engines:
            yield from _lint_engine(path, engine, parser)
    elif not path.exists():
        raise BadRequest(f"{path} does not exist: name a bundle, an .onnx or a .pt2 file")
    elif path.suffix.lower() == _GRAPH:
        content = read_regular(path, at_most=_MOST_BYTES)
        yield path.name, _graph(_lint(path, content, parser), parser)
    elif path.suffix.lower() == ".pt2" and parser is not None:
        raise BadRequest(f"{path}: --parser {parser} is for .onnx files and bundles")
    elif path.suffix.lower() == ".pt2":
        yield path.name, _graph(lint_program_file(path))
    else:
        raise BadRequest(f"{path} is not linted: name a bundle, an .onnx or a .pt2 file")


def _lint_engine(
    bundle: Path, engine: EngineRecord, parser: str | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The engine's ONNX graphs; where it has none, what its build counted."""
    graphs = {role: f for role, f in engine.files.items() if f.path.lower().endswith(_GRAPH)}
    if not graphs:
        yield engine.name, {"counts": dict(engine.lint), "findings": [], "recorded": True}
    for role, record in graphs.items():
        file = check_content(bundle, record)
        if file.identity.size > _MOST_BYTES:
            raise BundleError(f"{file.path} is larger than a graph without weights is")
        # Whatever else a Program has, its attentions are those of a step.
        expected = attention_count(engine.program) if role == WHOLE else None
        findings = _lint(file.path, file.read(), parser, expected)
        name = engine.name if len(graphs) == 1 else f"{engine.name} {role}"
        yield name, _graph(findings, parser)


def _lint(
    path: Path, content: bytes, parser: str | None = None, attentions: int | None = None
) -> list[Finding]:
    """Lint the content of an ONNX file; weights beside it are not read."""
    try:
        model = onnx.load_model_from_string(content)
        check_expansion(model)
        if not model.graph.node or not model.opset_import:
            raise ValueError("it has no graph")
        findings = lint_onnx(model, attentions)
        return findings + (lint_tensorrt(model) if parser == KIND else [])
    except WanExportError as error:
        raise WanExportError(f"{path}: {error}") from error
    except Exception as error:  # protobuf's and onnx's exceptions have no base but this
        raise WanExportError(
            f"{path} is no ONNX file that can be read: {first_line(error)}"
        ) from error
