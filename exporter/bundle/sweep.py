"""Removing what builds left in a bundle, and nothing else.

Ours is what a manifest or a journal named, what has the name of an unfinished file, and what lies
in a folder with a mark: a build makes its folders new, marks them first, and takes the mark off
when the journal that lists their files is written. No link is followed, whatever may be swapped
meanwhile: each folder is opened by its name in the one above.
"""

import os
import stat
from collections.abc import Iterator, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from wanexport.runtime.bundle.durable import fsync_folder, is_partial, remove_if_abandoned

MARK = ".unfinished"
_DEEPEST = 16  # levels of folders that are entered; builds make 4


@dataclass(frozen=True)
class Listing:
    """Files of a bundle by their paths in it: what stays, and what may go.

    listed are those of the manifest and the journal, unnoted those of them that neither has on
    disk yet, and dropped are those that an older manifest or journal listed.
    """

    listed: Set[str]
    unnoted: Set[str]
    dropped: Set[str]
    removed: list[str] = field(default_factory=list)  # by this sweep


def mark(folder: Path) -> None:
    """Say that all in a new folder is a build's own, until the journal says what is."""
    (folder / MARK).touch(exist_ok=False)
    fsync_folder(folder)


def sweep(bundle: Path, folder: str, listing: Listing) -> list[str]:
    """Remove a build's leftovers below a folder of the bundle; return what else is not listed."""
    with suppress(FileNotFoundError), _opened(bundle / folder) as handle:
        return _sweep(handle, PurePosixPath(folder), listing, ours=False)
    return []


@contextmanager
def _opened(path: str | Path, within: int | None = None) -> Iterator[int]:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    handle = os.open(path, flags, dir_fd=within)
    try:
        yield handle
    finally:
        os.close(handle)


def _sweep(folder: int, path: PurePosixPath, listing: Listing, *, ours: bool) -> list[str]:
    """Sweep an open folder, of this path in the bundle; ours says that a build made it."""
    names = sorted(os.listdir(folder))
    marked = MARK in names and stat.S_ISREG(_mode(MARK, folder))
    left = []
    for name in names:
        if marked and name == MARK:
            continue
        try:
            left += _sweep_entry(name, folder, path / name, listing, ours=ours or marked)
        except OSError:
            left.append(str(path / name))
    # The mark goes last: without it nothing tells what a kill leaves here from the user's own.
    if marked and not left and not any(path in PurePosixPath(f).parents for f in listing.unnoted):
        os.unlink(MARK, dir_fd=folder)
        listing.removed.append(str(path / MARK))
    return left


def _sweep_entry(
    name: str, folder: int, path: PurePosixPath, listing: Listing, *, ours: bool
) -> list[str]:
    mode, file = _mode(name, folder), str(path)
    if stat.S_ISDIR(mode) and len(path.parts) <= _DEEPEST:
        with _opened(name, folder) as handle:
            left = _sweep(handle, path, listing, ours=ours)
        if ours or any(gone.startswith(f"{file}/") for gone in listing.removed):
            with suppress(OSError):  # it is not empty
                os.rmdir(name, dir_fd=folder)
        return left
    if file in listing.listed:
        return []
    if stat.S_ISREG(mode) and is_partial(name):
        if not remove_if_abandoned(name, folder):
            return [file]
        listing.removed.append(file)
        return []
    if stat.S_ISREG(mode) and (ours or file in listing.dropped):
        os.unlink(name, dir_fd=folder)
        listing.removed.append(file)
        return []
    return [file]


def _mode(name: str, folder: int) -> int:
    return os.lstat(name, dir_fd=folder).st_mode
