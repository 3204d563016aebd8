"""Writing a bundle so that it is whole at every instant.

Nothing counts until the manifest lists it. What is finished before that is noted in a journal of
the manifest's own form, so that a build that was killed resumes with the finished parts. What a
build began and did not finish, or replaced, is swept away.
"""

import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from wanexport.exporter.bundle.lock import LOCK, bundle_lock
from wanexport.exporter.bundle.place import (
    CACHE,
    JOURNAL,
    REPLACED,
    REPORTS,
    is_begun,
    make_place,
    remove_empty,
)
from wanexport.exporter.bundle.sweep import Listing, mark, sweep
from wanexport.runtime.bundle.check import check_content, check_weights, file_sha256
from wanexport.runtime.bundle.durable import (
    fsync_folder,
    is_partial,
    own_folder,
    remove_partials,
    write_durably,
)
from wanexport.runtime.bundle.manifest import (
    MANIFEST,
    EngineRecord,
    FileRecord,
    Manifest,
    WeightsRecord,
    read_manifest,
    to_json,
)
from wanexport.runtime.bundle.path import ARTEFACTS
from wanexport.runtime.bundle.usable import unread_name, unread_unfamiliar, why_unusable
from wanexport.runtime.errors import BadRequest, WanExportError, WanExportWarning, explain

_SHOWN = 5  # names of a list that may be long
_Record = TypeVar("_Record")


class BundleWriter:
    """A bundle being added to.

    `committed` is the manifest on disk, `manifest` as it will be, and `journal` lists what any try
    has finished, this one included. `left` are the files that no build made, which stay.
    """

    def __init__(self, path: Path, empty: Manifest) -> None:
        self.path = path
        self.committed = self._read(MANIFEST) or empty
        self.manifest = replace(self.committed, wanexport=empty.wanexport)
        self.journal = self._read_old(JOURNAL) or empty
        self.left: list[str] = []
        if _identity(self.committed) != _identity(empty):
            raise BadRequest(
                f"{path} holds {self.committed.model}, of another config than this {empty.model}: "
                f"name another folder with -o"
            )
        # Whose files may go, once neither manifest nor journal lists them.
        self._named = _paths(self.committed, self.journal, self._read_old(REPLACED) or empty)
        self._noted = _paths(self.committed, self.journal)
        if _identity(self.journal) != _identity(empty):  # nothing of it was ever committed
            self.journal = empty

    def begin(self) -> None:
        """Clear up after earlier tries; from here a kill leaves a bundle to go on with."""
        self._note()

    def _read(self, name: str) -> Manifest | None:
        return read_manifest(self.path, name) if (self.path / name).exists() else None

    def _read_old(self, name: str) -> Manifest | None:
        try:
            return self._read(name)
        except WanExportError as error:
            if isinstance(error.__cause__, OSError):  # it may be whole, and name what is finished
                raise
            return None  # damaged, or of another version: it only saves work

    def _note(self) -> None:
        """Write the journal; what it drops goes while the old one names it."""
        self.sweep()
        write_manifest(self.path, self.journal, JOURNAL)
        self._noted = _paths(self.committed, self.journal)
        self._named |= self._noted
        self.sweep()

    def known_weights(self) -> dict[str, WeightsRecord]:
        """Every finished file of a weights set by its label, committed ones first."""
        return {**self.journal.weights, **self.committed.weights}

    def forget_weights(self, label: str) -> None:
        """Drop weights that an earlier try finished but none committed, and what they proved."""
        left = {key: record for key, record in self.journal.weights.items() if key != label}
        self.journal = replace(self.journal, weights=left, engines=())
        self._note()

    def find_weights(self, label: str, layout: str) -> WeightsRecord | None:
        """The finished weights of this label and layout, if they are whole on disk."""
        record = self.known_weights().get(label)
        if record and record.layout == layout:
            return record if _is_whole(check_weights, self.path, record) else None
        return None

    def find_engine(self, key: str) -> EngineRecord | None:
        """The finished engine of this key, if it is whole on disk; rather one proven in full."""
        known = (*self.committed.engines, *self.journal.engines)
        listed = {**self.known_weights(), **self.manifest.weights}
        manifest = replace(self.manifest, weights=listed)
        for engine in sorted(known, key=lambda engine: engine.proof.get("verify") != "full"):
            files = engine.files.values()
            if engine.key != key or why_unusable(self.path, manifest, engine):
                continue
            if all(_is_whole(check_content, self.path, f) for f in files):
                return engine
        return None

    def put_weights(self, label: str, record: WeightsRecord) -> None:
        """List finished weights, in the place of those of the same label."""
        self.manifest, self.journal = (
            replace(m, weights={**m.weights, label: record}) for m in (self.manifest, self.journal)
        )
        self._note()

    def put_engine(self, record: EngineRecord) -> None:
        """List a finished engine, in the place of one of the same name."""
        self.manifest, self.journal = (
            _with_engine(m, record) for m in (self.manifest, self.journal)
        )
        self._note()

    def free_folder(self, relative: Path) -> Path:
        """Make a folder for a build's files, numbered where its name is taken."""
        listed = _paths(self.committed, self.journal, self.manifest)
        used = {str(Path(file).parent) for file in listed}
        parent = self.path
        for part in relative.parent.parts:
            parent = own_folder(parent, part)
        name, number = relative.name, 2
        while str(relative.with_name(name)) in used or os.path.lexists(parent / name):
            name, number = f"{relative.name}.{number}", number + 1
        (parent / name).mkdir()
        mark(parent / name)
        for folder in (parent, *parent.parents[: len(relative.parts) - 1]):
            fsync_folder(folder)
        return parent / name

    def commit(self, *, keeps_unfinished: bool = False) -> None:
        """Make the new manifest the bundle's, and remove what it does not list.

        With keeps_unfinished, what another build had finished without committing it stays for that.
        """
        if self.committed.files() and self.committed != self.manifest:
            write_manifest(self.path, self.committed, REPLACED)
        write_manifest(self.path, self.manifest)
        try:
            self.committed = self.manifest
            stays = keeps_unfinished and not _paths(self.journal) <= _paths(self.manifest)
            if stays:
                write_manifest(self.path, self.journal, JOURNAL)
            else:
                self.journal = self.manifest
            self._noted = _paths(self.committed, self.journal)
            self.sweep()
            (self.path / REPLACED).unlink(missing_ok=True)
            if not stays:
                (self.path / JOURNAL).unlink()
            fsync_folder(self.path)
        except OSError as error:
            raise WanExportError(
                f"{self.path} is written and holds what was built, but clearing up failed: "
                f"{explain(error)}; run the same command again"
            ) from error

    def sweep(self) -> None:
        """Remove what builds left that neither the manifest nor the journal lists."""
        listed = _paths(self.committed, self.journal)
        listing = Listing(listed, listed - self._noted, self._named - listed)
        self.left = [name for folder in ARTEFACTS for name in sweep(self.path, folder, listing)]
        # The bundle itself may be a link, which would not be entered.
        remove_partials(self.path.resolve(), lambda name: is_begun(name) or is_partial(name))
        for folder in (CACHE, REPORTS):
            remove_partials(self.path / folder)

    def abandon(self) -> None:
        """After a failure: keep what is finished for the next try, and leave nothing else."""
        nothing = replace(self.committed, weights={}, engines=())
        self.committed = self._read(MANIFEST) or nothing
        self.journal = self._read_old(JOURNAL) or nothing
        self._noted = _paths(self.committed, self.journal)
        self.sweep()
        if _paths(self.journal) <= _paths(self.committed):
            self._leave(is_bundle=bool(self.committed.files()))

    def _leave(self, *, is_bundle: bool) -> None:
        """Remove what only a build needs, which has nothing finished that is not committed."""
        if is_bundle:
            names: tuple[str, ...] = (REPLACED, JOURNAL)
        else:
            remove_empty([self.path / name for name in ARTEFACTS])
            names = (REPLACED, JOURNAL, LOCK)
            if any(os.path.lexists(self.path / name) for name in ARTEFACTS):
                return  # without its journal it would be no bundle, and bar the next try
        for name in names:
            (self.path / name).unlink(missing_ok=True)


def _paths(*manifests: Manifest) -> set[str]:
    return {file.path for manifest in manifests for file in manifest.files()}


def _with_engine(manifest: Manifest, record: EngineRecord) -> Manifest:
    """The manifest with an engine in the place of one of its name, be it one that cannot be read;
    what a later version made of another kind stays."""
    engines = {engine.name: engine for engine in manifest.engines} | {record.name: record}
    unread = [d for d in manifest.unread if unread_unfamiliar(d) or unread_name(d) != record.name]
    return replace(manifest, engines=tuple(engines.values()), unread=tuple(unread))


def _identity(manifest: Manifest) -> tuple[Any, ...]:
    return manifest.config, manifest.experts


def _is_whole(check: Callable[[Path, _Record], object], bundle: Path, record: _Record) -> bool:
    try:
        check(bundle, record)
    except WanExportError:
        return False
    return True


@contextmanager
def open_bundle(path: Path, empty: Manifest) -> Iterator[BundleWriter]:
    """Lock a new or existing bundle for writing; `empty` is the manifest of a new one.

    Raises WanExportError when the path is something else than a bundle, holds another model, is
    being written by another process, or cannot be written, and in the place of an OSError inside.
    """
    created = make_place(path)
    try:
        with bundle_lock(path):
            writer = BundleWriter(path, empty)
            try:
                writer.begin()
                yield writer
            except BaseException:
                with suppress(OSError, WanExportError):  # the first error is the one to tell
                    writer.abandon()
                raise
    except BaseException as error:
        remove_empty(created)
        if isinstance(error, OSError):
            where = f"{path}: " if error.filename is None else ""
            raise WanExportError(where + explain(error)) from error
        raise
    _tell_left(path, writer.left)


def _tell_left(path: Path, left: list[str]) -> None:
    """Name what a sweep did not touch."""
    if left:
        shown = [name if name.isprintable() else ascii(name) for name in left[:_SHOWN]]
        more = f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
        warnings.warn(
            f"left alone in {path}, as no build made it or may remove it: {', '.join(shown)}{more}",
            WanExportWarning,
            stacklevel=4,
        )


def write_manifest(bundle: Path, manifest: Manifest, name: str = MANIFEST) -> None:
    """Replace the manifest in one step; what it lists must be on disk by then."""
    write_durably(bundle / name, (json.dumps(to_json(manifest), indent=1) + "\n").encode())


def file_record(bundle: Path, path: Path) -> FileRecord:
    """Size and hash of a finished file of the bundle."""
    return FileRecord(path.relative_to(bundle).as_posix(), path.stat().st_size, file_sha256(path))
