"""The folder for temporary files, refused before the work where it would fail in the middle.

Python would pass over one that is missing or full, and take another in silence.
"""

import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from wanexport.runtime.errors import EngineFailure

PREFIX = "wanexport-"  # of every temporary folder of ours
_MARK = ".wanexport-temporary"  # in each of them: the name alone may be a user's own
_NAMES = ("TMPDIR", "TEMP", "TMP")  # as Python asks for it
_ABANDONED = 24 * 3600  # seconds after which no process of ours uses a folder
_NEEDED = 1 << 20  # bytes, for what processes say and are told
_NEEDED_BY_LIBTORCH = 16 << 20  # which unpacks a package before it opens the library in it
_NEEDED_BY_COMPILERS = 128 << 20  # by three at once: sources, objects and a precompiled header


def check_temporary_folder(*, runs_code: bool = False, compiles: bool = False) -> None:
    """Raise EngineFailure unless temporary files can be made here.

    runs_code says that code is unpacked there and run, compiles that it is made there too. Folders
    that processes of this user left there more than a day ago are removed.
    """
    variable = next((name for name in _NAMES if os.environ.get(name)), None)
    folder = Path(os.environ[variable] if variable else "/tmp")  # Windows sets TEMP
    runs_code = runs_code or compiles
    cure = f"set TMPDIR to a folder {'that may run programs, ' if runs_code else ''}with room"
    needed = _NEEDED_BY_LIBTORCH if runs_code else _NEEDED
    if obstacle := _obstacle(folder, runs_code, _NEEDED_BY_COMPILERS if compiles else needed):
        origin = f" ({variable})" if variable else ""
        raise EngineFailure(f"temporary files go to {folder}{origin}, {obstacle}: {cure}")
    _remove_abandoned(folder)


@contextmanager
def marked_folder(prefix: str = PREFIX) -> Iterator[Path]:
    """A new temporary folder that a later process removes if this one is killed.

    Raises OSError where none can be made.
    """
    with TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as name:
        folder = Path(name).resolve()
        (folder / _MARK).touch()
        yield folder


def _obstacle(folder: Path, runs_code: bool, needed: int) -> str:
    """What keeps temporary files from a folder, or ""."""
    try:
        return _obstacle_of(folder, runs_code, needed)
    except OSError as error:  # a name that is too long, a folder above that may not be entered
        return f"which cannot be used ({error.strerror})"


def _obstacle_of(folder: Path, runs_code: bool, needed: int) -> str:
    if not folder.is_dir():
        return "which is a file" if folder.exists() else "which does not exist"
    free, is_noexec = _free_and_noexec(folder)
    if runs_code and is_noexec:
        return "which is mounted noexec: compiled code cannot run there"
    if free < needed:
        return f"which is full: {needed >> 20} MB are needed, {free / (1 << 20):.1f} MB are free"
    return _write_obstacle(folder / f"{PREFIX}{secrets.token_hex(8)}")


def _free_and_noexec(folder: Path) -> tuple[int, bool]:
    """The bytes that are free in a folder, and whether it forbids programs."""
    if not hasattr(os, "statvfs"):  # Windows
        return shutil.disk_usage(folder).free, False
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize, bool(status.f_flag & os.ST_NOEXEC)


def _write_obstacle(path: Path) -> str:
    try:
        with path.open("xb") as file:
            file.write(bytes(4096))
    except OSError as error:
        return f"which cannot be written ({error.strerror})"
    finally:
        with suppress(OSError):
            path.unlink()
    return ""


def _remove_abandoned(folder: Path) -> None:
    """Remove folders of ours that nothing has touched for a day: their processes were killed."""
    with suppress(OSError):
        for entry in os.scandir(folder):
            with suppress(OSError):
                status = entry.stat(follow_symlinks=False)
                is_ours = entry.name.startswith(PREFIX) and _is_own(status)
                is_ours = is_ours and stat.S_ISDIR(status.st_mode)
                if is_ours and (Path(entry.path) / _MARK).is_file() and _is_old(entry.path):
                    shutil.rmtree(entry.path)


def _is_own(status: os.stat_result) -> bool:
    """Whether a folder is this user's; Windows gives each user a folder for temporary files."""
    return not hasattr(os, "getuid") or status.st_uid == os.getuid()


def _is_old(folder: str) -> bool:
    """Whether nothing in the folder is newer than a day."""
    newest = max(
        os.lstat(os.path.join(root, name)).st_mtime
        for root, _, files in os.walk(folder)
        for name in (".", *files)
    )
    return time.time() - newest > _ABANDONED
