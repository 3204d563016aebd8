"""`wanexport inspect` and `ls`: what a bundle holds, and whether its files are as built."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

from wanexport.runtime.bundle.check import check_content, check_weights
from wanexport.runtime.bundle.manifest import (
    DENOISER,
    EngineRecord,
    Manifest,
    WeightsRecord,
    read_manifest,
)
from wanexport.runtime.bundle.tensorfile import read_header
from wanexport.runtime.bundle.usable import (
    unread_name,
    unread_unfamiliar,
    why_unread,
    why_unusable,
)
from wanexport.runtime.errors import WanExportError
from wanexport.runtime.fitting import needs_of_engine
from wanexport.runtime.gpu_fit import BUSES, CARDS, Needs, fit, room_of_card


def inspect(bundle: str | Path, *, verify: bool = False) -> dict[str, Any]:
    """Describe a bundle; `problems` says what is wrong with its files, nothing when it is empty.

    `sets` are the weights sets; `unread` are engines whose records cannot be read, as they are in
    the manifest. Sizes, weights' headers and engines are checked, and with verify the hash of every
    file. What a later version made is no problem while there is an engine beside it that can be
    used.
    Raises WanExportError when the folder is no bundle, or its manifest cannot be read.
    """
    bundle = Path(bundle)
    manifest = read_manifest(bundle)
    problems = list(_problems(bundle, manifest, verify))
    return {
        "bundle": str(bundle),
        "family": manifest.config.family,
        **asdict(manifest),
        "sets": _sets(manifest),
        "parameters": None if problems else _parameters(bundle, manifest),
        "bytes": sum(file.size for file in manifest.files()),
        "engines": [_describe(bundle, manifest, engine) for engine in manifest.engines],
        "unread": [
            {**data, "name": unread_name(data), "unusable": why_unread(bundle, manifest, data)}
            for data in manifest.unread
        ],
        "verified": verify,
        "problems": problems,
    }


def list_bundle(bundle: str | Path) -> dict[str, Any]:
    """The weights sets and engines of a bundle, as `wanexport ls` shows them.

    Each set has its recipe, and of each file its precision, expert, size and origin. Raises as
    `inspect` does.
    """
    bundle = Path(bundle)
    manifest = read_manifest(bundle)
    sets: dict[tuple[str, str], list[WeightsRecord]] = {}
    for record in manifest.weights.values():
        sets.setdefault((record.name, record.role), []).append(record)
    engines = [
        {
            "name": engine.name,
            "bytes": sum(file.size for file in engine.files.values()),
            "unusable": why_unusable(bundle, manifest, engine),
        }
        for engine in manifest.engines
    ]
    engines += [
        {"name": unread_name(data), "bytes": 0, "unusable": why_unread(bundle, manifest, data)}
        for data in manifest.unread
    ]
    return {
        "bundle": str(bundle),
        "model": manifest.model,
        "bytes": sum(file.size for file in manifest.files()),
        "sets": [_listed_set(name, records) for (name, _), records in sets.items()],
        "engines": engines,
    }


def _listed_set(name: str, records: Sequence[WeightsRecord]) -> dict[str, Any]:
    return {
        "name": name,
        "role": records[0].role,
        "recipe": records[0].recipe,
        "bytes": sum(record.file.size for record in records),
        "files": [
            {
                "expert": record.expert,
                "dtype": record.dtype,
                "bytes": record.file.size,
                "path": record.file.path,
                "sha256": record.file.sha256,
                "source": record.source,
            }
            for record in records
        ],
    }


def _sets(manifest: Manifest) -> list[dict[str, Any]]:
    """The weights sets, each in one layout: its files by expert, and the engines that read them."""
    sets: dict[tuple[str, str, str], dict[str, Any]] = {}
    for label, record in manifest.weights.items():
        names = {"name": record.name, "role": record.role, "dtype": record.dtype}
        key = (record.name, record.role, record.layout)
        engines = [e.name for e in manifest.engines if e.layout == record.layout]
        described = {**names, "layout": record.layout, "experts": {}, "engines": engines}
        sets.setdefault(key, described)["experts"][record.expert] = label
    return list(sets.values())


def _describe(bundle: Path, manifest: Manifest, engine: EngineRecord) -> dict[str, Any]:
    """The engine's record with what follows from it."""
    return {
        "name": engine.name,
        "tokens": engine.geometry.num_tokens,
        "bytes": sum(file.size for file in engine.files.values()),
        "unusable": why_unusable(bundle, manifest, engine),
        "cards": _cards(bundle, manifest, engine),
        **asdict(engine),
    }


def _cards(bundle: Path, manifest: Manifest, engine: EngineRecord) -> list[dict[str, Any]]:
    """How the engine fits on GPUs of several sizes, where it is one for a GPU that streams blocks;
    nothing where a size has no row."""
    weights = next((w for w in manifest.weights.values() if w.layout == engine.layout), None)
    if engine.role != DENOISER or engine.target.get("device") != "cuda" or weights is None:
        return []
    try:
        needs = needs_of_engine(manifest, engine, read_header(bundle / weights.file.path))
    except WanExportError:  # what `problems` tells
        return []
    return fits_on_cards(needs) if needs.layers else []


def fits_on_cards(needs: Needs, cards: Sequence[int] = CARDS) -> list[dict[str, Any]]:
    """How a model fits on GPUs of these bytes, with how long a forward's copies take at least."""
    rows = []
    for card in cards:
        found = fit(needs, room_of_card(card))
        if found is not None:
            seconds = {name: found.streamed / rate for name, rate in BUSES.items()}
            blocks = needs.layers
            rows.append(
                {"card": card, **found._asdict(), "blocks": blocks, "copy_seconds": seconds}
            )
    return rows


def _parameters(bundle: Path, manifest: Manifest) -> int:
    """How many parameters one expert has."""
    weights = next((w for w in manifest.weights.values() if w.role == DENOISER), None)
    if weights is None:
        return 0
    return sum(prod(entry.shape) for entry in read_header(bundle / weights.file.path).values())


def _problems(bundle: Path, manifest: Manifest, verify: bool) -> Iterator[str]:
    engines = [(why_unusable(bundle, manifest, e), e.unfamiliar) for e in manifest.engines]
    engines += [
        (why_unread(bundle, manifest, data), unread_unfamiliar(data)) for data in manifest.unread
    ]
    is_all = all(reason for reason, _ in engines)
    yield from (reason for reason, later in engines if reason and (is_all or not later))
    if not engines:
        yield f"{bundle} has no engine: add one with wanexport build -o {bundle}"
    yield from _file_problems(bundle, manifest, verify)


def _file_problems(bundle: Path, manifest: Manifest, verify: bool) -> Iterator[str]:
    """What is wrong with files: engines are hashed, weights by request and each by its header."""
    weights = {record.file.path: record for record in manifest.weights.values()}
    for file in manifest.files():
        try:
            if file.path in weights:
                check_weights(bundle, weights[file.path])
            if verify or file.path not in weights:
                check_content(bundle, file)
        except WanExportError as error:
            yield str(error)
