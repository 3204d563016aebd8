"""Writing a bundle so that it is whole at every instant.

Nothing counts until the manifest lists it. What is finished before that is noted in a journal of
the manifest's own form, so that a build that was killed resumes with the finished parts; what
neither lists is swept away.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from wanexport.runtime.errors import WanExportError
from wanexport.runtime.manifest import (
    MANIFEST,
    EngineRecord,
    Manifest,
    WeightsRecord,
    bundle_lock,
    check_engine_file,
    check_weights,
    read_manifest,
    write_manifest,
)

JOURNAL = "manifest.partial.json"
_LOCK = ".lock"
_ARTEFACTS = ("weights", "engines")
_Record = TypeVar("_Record")


class BundleWriter:
    """A bundle being added to: its manifest as it will be, and what an earlier try finished."""

    def __init__(self, path: Path, empty: Manifest) -> None:
        self.path = path
        self.committed = self._read(MANIFEST) or empty
        self.journal = self._read(JOURNAL) or empty
        self.manifest = self.committed
        for found in (self.committed, self.journal):
            if (found.config, found.experts) != (empty.config, empty.experts):
                raise WanExportError(
                    f"{path} holds {found.model}, of another config than this {empty.model}: "
                    f"name another folder with -o"
                )
        self.sweep()

    def _read(self, name: str) -> Manifest | None:
        return read_manifest(self.path, name) if (self.path / name).exists() else None

    def find_weights(
        self, name: str, matches: Callable[[WeightsRecord], bool]
    ) -> WeightsRecord | None:
        """The finished weights set of this name that matches and is whole on disk."""
        for manifest in (self.committed, self.journal):
            record = manifest.weights.get(name)
            if record and matches(record) and _is_whole(check_weights, self.path, record):
                return record
        return None

    def find_engine(self, key: str, weights: dict[str, str]) -> EngineRecord | None:
        """The finished engine of this key, proven with these weights (set -> key) and whole."""
        for engine in (*self.committed.engines, *self.journal.engines):
            proven = engine.key == key and engine.proof.get("weights") == weights
            files = engine.files.values()
            if proven and all(_is_whole(check_engine_file, self.path, file) for file in files):
                return engine
        return None

    def put_weights(self, name: str, record: WeightsRecord) -> None:
        """List a finished weights set, in the place of one of the same name."""
        self.manifest = replace(self.manifest, weights={**self.manifest.weights, name: record})
        write_manifest(self.path, self.manifest, JOURNAL)

    def put_engine(self, record: EngineRecord) -> None:
        """List a finished engine, in the place of one of the same name."""
        engines = {engine.name: engine for engine in self.manifest.engines} | {record.name: record}
        self.manifest = replace(self.manifest, engines=tuple(engines.values()))
        write_manifest(self.path, self.manifest, JOURNAL)

    def free_folder(self, relative: Path) -> Path:
        """Create the folder, numbered where a listed file already lives in one of that name."""
        manifests = (self.committed, self.journal, self.manifest)
        used = {str(Path(file.path).parent) for m in manifests for file in m.files()}
        candidate, number = relative, 2
        while str(candidate) in used:
            candidate, number = relative.with_name(f"{relative.name}.{number}"), number + 1
        folder = self.path / candidate
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def commit(self) -> None:
        """Make the new manifest the bundle's, and remove what it does not list."""
        write_manifest(self.path, self.manifest)
        (self.path / JOURNAL).unlink(missing_ok=True)
        self.committed = self.journal = self.manifest
        self.sweep()

    def sweep(self) -> None:
        """Remove artefacts that neither the manifest nor the journal lists."""
        listed = {file.path for m in (self.committed, self.journal) for file in m.files()}
        for folder in _ARTEFACTS:
            for path in sorted((self.path / folder).rglob("*"), reverse=True):
                if path.is_dir():
                    _remove_if_empty(path)
                elif path.relative_to(self.path).as_posix() not in listed:
                    path.unlink()

    def abandon(self) -> None:
        """After a failure: keep what is finished for the next try, and leave nothing else."""
        self.journal = self._read(JOURNAL) or self.committed
        self.sweep()
        if not (self.path / MANIFEST).exists() and not (self.path / JOURNAL).exists():
            (self.path / _LOCK).unlink()
            for folder in (*(self.path / name for name in _ARTEFACTS), self.path):
                _remove_if_empty(folder)


def _is_whole(check: Callable[[Path, _Record], Path], bundle: Path, record: _Record) -> bool:
    try:
        check(bundle, record)
    except WanExportError:
        return False
    return True


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


@contextmanager
def open_bundle(path: Path, empty: Manifest) -> Iterator[BundleWriter]:
    """Lock a new or existing bundle for writing; `empty` is the manifest of a new one.

    Raises WanExportError when the path is something else than a bundle, holds another model, or is
    being written by another process.
    """
    if path.exists() and not path.is_dir():
        raise WanExportError(f"{path} is a file: name a folder with -o")
    marks = (MANIFEST, JOURNAL, _LOCK)
    if path.exists() and any(path.iterdir()) and not any((path / m).exists() for m in marks):
        raise WanExportError(f"{path} exists and is no bundle: name another folder with -o")
    path.mkdir(parents=True, exist_ok=True)
    with bundle_lock(path):
        writer = BundleWriter(path, empty)
        try:
            yield writer
        except BaseException:
            writer.abandon()
            raise
