"""Writing a bundle so that it is whole at every instant.

Nothing counts until the manifest lists it. What is finished before that is noted in a journal of
the manifest's own form, so that a build that was killed resumes with the finished parts; what
neither lists is swept away.
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from wanexport.runtime.check import check_content, check_weights, file_sha256
from wanexport.runtime.durable import fsync_folder, write_durably
from wanexport.runtime.errors import WanExportError
from wanexport.runtime.manifest import (
    MANIFEST,
    EngineRecord,
    FileRecord,
    Manifest,
    WeightsRecord,
    read_manifest,
    to_json,
)
from wanexport.runtime.usable import why_unusable

JOURNAL = "manifest.partial.json"
LOCK = ".lock"
_ARTEFACTS = ("weights", "engines")
_Record = TypeVar("_Record")


class BundleWriter:
    """A bundle being added to.

    `committed` is the manifest on disk, `manifest` as it will be, and `journal` lists what any try
    has finished, this one included. `created` are the folders made for it, innermost first.
    """

    def __init__(self, path: Path, empty: Manifest, created: Sequence[Path]) -> None:
        self.path, self.created = path, created
        self.committed = self._read(MANIFEST) or empty
        self.manifest = replace(self.committed, wanexport=empty.wanexport)
        self.journal = self._read_journal() or empty
        if _identity(self.committed) != _identity(empty):
            raise WanExportError(
                f"{path} holds {self.committed.model}, of another config than this {empty.model}: "
                f"name another folder with -o"
            )
        if _identity(self.journal) != _identity(empty):  # nothing of it was ever committed
            self.journal = empty
        write_manifest(path, self.journal, JOURNAL)
        self.sweep()

    def _read(self, name: str) -> Manifest | None:
        return read_manifest(self.path, name) if (self.path / name).exists() else None

    def _read_journal(self) -> Manifest | None:
        try:
            return self._read(JOURNAL)
        except WanExportError:  # of another version, say: it only saves work
            return None

    def known_weights(self) -> dict[str, WeightsRecord]:
        """Every finished weights set by name, committed ones first."""
        return {**self.journal.weights, **self.committed.weights}

    def forget_weights(self, name: str) -> None:
        """Drop weights that an earlier try finished but none committed, and what they proved."""
        left = {key: record for key, record in self.journal.weights.items() if key != name}
        self.journal = replace(self.journal, weights=left, engines=())
        write_manifest(self.path, self.journal, JOURNAL)
        self.sweep()

    def find_weights(self, name: str, header_sha256: str) -> WeightsRecord | None:
        """The finished weights set of this name and layout, if it is whole on disk."""
        record = self.known_weights().get(name)
        if record and record.header_sha256 == header_sha256:
            return record if _is_whole(check_weights, self.path, record) else None
        return None

    def find_engine(self, key: str) -> EngineRecord | None:
        """The finished engine of this key, if it is whole on disk."""
        for engine in (*self.committed.engines, *self.journal.engines):
            files = engine.files.values()
            if engine.key != key or why_unusable(self.path, self.manifest, engine):
                continue
            if all(_is_whole(check_content, self.path, f) for f in files):
                return engine
        return None

    def put_weights(self, name: str, record: WeightsRecord) -> None:
        """List a finished weights set, in the place of one of the same name."""
        self.manifest, self.journal = (
            replace(m, weights={**m.weights, name: record}) for m in (self.manifest, self.journal)
        )
        write_manifest(self.path, self.journal, JOURNAL)

    def put_engine(self, record: EngineRecord) -> None:
        """List a finished engine, in the place of one of the same name."""
        self.manifest, self.journal = (
            replace(
                m, engines=tuple(({e.name: e for e in m.engines} | {record.name: record}).values())
            )
            for m in (self.manifest, self.journal)
        )
        write_manifest(self.path, self.journal, JOURNAL)

    def free_folder(self, relative: Path) -> Path:
        """Create the folder, numbered where a listed file already lives in one of that name."""
        manifests = (self.committed, self.journal, self.manifest)
        used = {str(Path(file.path).parent) for m in manifests for file in m.files()}
        candidate, number = relative, 2
        while str(candidate) in used:
            candidate, number = relative.with_name(f"{relative.name}.{number}"), number + 1
        folder = self.path / candidate
        folder.mkdir(parents=True, exist_ok=True)
        for parent in folder.parents[: len(candidate.parts)]:
            fsync_folder(parent)
        return folder

    def commit(self) -> None:
        """Make the new manifest the bundle's, and remove what it does not list."""
        write_manifest(self.path, self.manifest)
        self.committed = self.journal = self.manifest
        (self.path / JOURNAL).unlink()
        self.sweep()

    def sweep(self) -> None:
        """Remove artefacts that neither the manifest nor the journal lists."""
        listed = {file.path for m in (self.committed, self.journal) for file in m.files()}
        for partial in self.path.glob("*.partial"):
            partial.unlink()
        for folder in _ARTEFACTS:
            for path in sorted((self.path / folder).rglob("*"), reverse=True):
                if path.is_dir():
                    _remove_if_empty(path)
                elif path.relative_to(self.path).as_posix() not in listed:
                    path.unlink()

    def abandon(self) -> None:
        """After a failure: keep what is finished for the next try, and leave nothing else."""
        self.committed = self._read(MANIFEST) or replace(self.committed, weights={}, engines=())
        self.sweep()
        if not self.committed.files() and not self.journal.files():
            (self.path / JOURNAL).unlink(missing_ok=True)
            (self.path / LOCK).unlink(missing_ok=True)
            for folder in (*(self.path / name for name in _ARTEFACTS), *self.created):
                _remove_if_empty(folder)


def _identity(manifest: Manifest) -> tuple[Any, ...]:
    return manifest.config, manifest.experts


def _is_whole(check: Callable[[Path, _Record], Path], bundle: Path, record: _Record) -> bool:
    try:
        check(bundle, record)
    except WanExportError:
        return False
    return True


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _prepare(path: Path) -> list[Path]:
    """Make the bundle's folder and return the folders that this took, innermost first."""
    if path.exists() and not path.is_dir():
        raise WanExportError(f"{path} is a file: name a folder with -o")
    if path.exists() and not (path / MANIFEST).exists() and not (path / JOURNAL).exists():
        if any(entry.name != LOCK for entry in path.iterdir()):
            raise WanExportError(f"{path} exists and is no bundle: name another folder with -o")
    created = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    return created


@contextmanager
def open_bundle(path: Path, empty: Manifest) -> Iterator[BundleWriter]:
    """Lock a new or existing bundle for writing; `empty` is the manifest of a new one.

    Raises WanExportError when the path is something else than a bundle, holds another model, or is
    being written by another process.
    """
    try:
        created = _prepare(path)
    except OSError as error:
        raise WanExportError(
            f"cannot make {path} ({error.strerror}): name another folder with -o"
        ) from error
    with bundle_lock(path):
        writer = BundleWriter(path, empty, created)
        try:
            yield writer
        except BaseException:
            writer.abandon()
            raise


def write_manifest(bundle: Path, manifest: Manifest, name: str = MANIFEST) -> None:
    """Replace the manifest in one step; what it lists must be on disk by then."""
    write_durably(bundle / name, (json.dumps(to_json(manifest), indent=1) + "\n").encode())


@contextmanager
def bundle_lock(bundle: Path) -> Iterator[None]:
    """Hold the bundle against other writers. Raises WanExportError when one is at work."""
    path = bundle / LOCK
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_current = os.fstat(file.fileno()).st_ino == path.stat().st_ino
        except (BlockingIOError, FileNotFoundError):
            is_current = False
        if not is_current:  # held by another, or removed by one that gave up
            raise WanExportError(f"another wanexport is writing {bundle}: wait for it to end")
        yield


def file_record(bundle: Path, path: Path) -> FileRecord:
    """Size and hash of a finished file of the bundle."""
    return FileRecord(path.relative_to(bundle).as_posix(), path.stat().st_size, file_sha256(path))
