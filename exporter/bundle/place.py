"""Where a bundle may be written: refused before the work, and nothing touched.

A bundle that is written lies in one folder, as real files. Through a link in it a build would
write and delete elsewhere: in a hub's cache, say, whose files are links to its store.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from wanexport.exporter.bundle.lock import LOCK, SOFT_LOCK
from wanexport.runtime.bundle.durable import fsync_folder, is_partial
from wanexport.runtime.bundle.manifest import MANIFEST, read_manifest
from wanexport.runtime.bundle.path import ARTEFACTS
from wanexport.runtime.errors import BadRequest, WanExportError

JOURNAL = "manifest.partial.json"
REPLACED = "manifest.replaced.json"  # the manifest before, until what only it lists is removed
REPORTS = "reports"
CACHE = "cache"  # which no engine reads
_MANIFESTS = (MANIFEST, JOURNAL, REPLACED)


def check_place(path: Path) -> None:
    """Raise BadRequest unless a build may make a bundle here, or add to the one there is."""
    with _refusing(path):
        if path.is_dir():
            _check_bundle(path)
        elif os.path.lexists(path):
            kind = "a file" if path.is_file() else "no folder"
            raise BadRequest(f"{path} is {kind}: name a folder with -o")
        else:
            _check_writable(next(p for p in path.absolute().parents if os.path.lexists(p)))


def make_place(path: Path) -> list[Path]:
    """Make the bundle's folder and return the folders that this took, innermost first.

    Raises BadRequest as `check_place` does.
    """
    check_place(path)
    created = [folder for folder in (path, *path.parents) if not folder.exists()]
    with _refusing(path):
        try:
            path.mkdir(parents=True, exist_ok=True)
            for folder in created:
                fsync_folder(folder.parent)
        except OSError:
            remove_empty(created)
            raise
    return created


def remove_empty(folders: list[Path]) -> None:
    """Remove those of the folders, innermost first, that exist and are empty."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def is_begun(name: str) -> bool:
    """Whether a file of this name is a manifest or journal that a killed build was writing."""
    # The second form, without a random part, is that of earlier versions.
    return any(
        name == f"{manifest}.partial" or (is_partial(name) and name.startswith(f"{manifest}."))
        for manifest in _MANIFESTS
    )


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BadRequest(
            f"cannot make {path} ({error.strerror}): name another folder with -o"
        ) from error


def _check_bundle(path: Path) -> None:
    names = os.listdir(path)
    if not {MANIFEST, JOURNAL} & set(names):
        if not all(name.startswith(LOCK) or is_begun(name) for name in names):
            raise BadRequest(f"{path} exists and is no bundle: name another folder with -o")
    for name in (*_MANIFESTS, LOCK, SOFT_LOCK):
        _check_entry(path, name, "regular file")
    for name in (*ARTEFACTS, CACHE, REPORTS):
        _check_entry(path, name, "folder")
    for file in _listed(path):
        for folder in PurePosixPath(file).parents[:-1]:  # the last is the bundle itself
            _check_entry(path, str(folder), "folder")
        _check_entry(path, file, "regular file")
    _check_writable(path)


def _listed(path: Path) -> Iterator[str]:
    """The files that the bundle's manifest and journal list."""
    for name in _MANIFESTS:
        if os.path.lexists(path / name):
            # What is wrong with a manifest is told where it is read, a journal only saves work.
            with suppress(WanExportError):
                yield from (file.path for file in read_manifest(path, name).files())


def _check_entry(bundle: Path, name: str, kind: str) -> None:
    """Raise BadRequest when a bundle has something else than a file or a folder there."""
    try:
        mode = os.lstat(bundle / name).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    is_kind = {"regular file": stat.S_ISREG, "folder": stat.S_ISDIR}[kind]
    if stat.S_ISLNK(mode) and not name.startswith(LOCK):
        raise BadRequest(
            f"{bundle / name} is a link, and a build writes no bundle that lies elsewhere too: "
            f"copy it with cp -rL and name the copy with -o; for another disk, make the whole "
            f"bundle a link to a folder there"
        )
    if not is_kind(mode):
        raise BadRequest(
            f"{bundle / name} is no {kind}, which a bundle has there: remove it, or name another "
            f"folder with -o"
        )


def _check_writable(folder: Path) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise BadRequest(f"{folder} cannot be written: name another folder with -o")
