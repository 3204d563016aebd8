"""`wanexport inspect`: what a bundle holds, and whether its files are as they were built."""

from collections.abc import Iterator
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

from wanexport.runtime.bundle.check import check_content, check_weights
from wanexport.runtime.bundle.manifest import EngineRecord, Manifest, read_manifest
from wanexport.runtime.bundle.tensorfile import read_header
from wanexport.runtime.bundle.usable import why_unusable
from wanexport.runtime.errors import WanExportError


def inspect(bundle: str | Path, *, verify: bool = False) -> dict[str, Any]:
    """Describe a bundle; `problems` says what is wrong with its files, nothing when it is empty.

    Sizes, weights' headers and engines are checked, and with verify the hash of every file. What a
    later version made is no problem while there is an engine beside it that can be used.
    Raises WanExportError when the folder is no bundle, or its manifest cannot be read.
    """
    bundle = Path(bundle)
    manifest = read_manifest(bundle)
    problems = list(_problems(bundle, manifest, verify))
    return {
        "bundle": str(bundle),
        **asdict(manifest),
        "parameters": None if problems else _parameters(bundle, manifest),
        "bytes": sum(file.size for file in manifest.files()),
        "engines": [_describe(bundle, manifest, engine) for engine in manifest.engines],
        "verified": verify,
        "problems": problems,
    }


def _describe(bundle: Path, manifest: Manifest, engine: EngineRecord) -> dict[str, Any]:
    """The engine's record with what follows from it."""
    return {
        "name": engine.name,
        "tokens": engine.geometry.num_tokens,
        "bytes": sum(file.size for file in engine.files.values()),
        "unusable": why_unusable(bundle, manifest, engine),
        **asdict(engine),
    }


def _parameters(bundle: Path, manifest: Manifest) -> int:
    """How many parameters one expert has."""
    weights = next(iter(manifest.weights.values()), None)
    if weights is None:
        return 0
    return sum(prod(entry.shape) for entry in read_header(bundle / weights.file.path).values())


def _problems(bundle: Path, manifest: Manifest, verify: bool) -> Iterator[str]:
    for record in manifest.weights.values():
        try:
            check_weights(bundle, record)
            if verify:
                check_content(bundle, record.file)
        except WanExportError as error:
            yield str(error)
    reasons = [why_unusable(bundle, manifest, engine) for engine in manifest.engines]
    for engine, reason in zip(manifest.engines, reasons):
        if reason and (all(reasons) or not engine.unfamiliar):
            yield reason
        for file in engine.files.values():
            try:
                check_content(bundle, file)
            except WanExportError as error:
                yield str(error)
    if not reasons:
        yield f"{bundle} has no engine: add one with wanexport build -o {bundle}"
