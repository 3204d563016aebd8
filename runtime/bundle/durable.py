"""Files that appear whole, and stay after a power cut, or not at all.

Until it is whole a file has a name of its own beside the one that it is for. Its writer holds a
lock on it, so that what a killed writer left can be told from what is being written, and removed.
"""

import errno
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

from wanexport.runtime.errors import WanExportError

_PARTIAL = re.compile(r".*\.[0-9a-f]{8}\.partial", re.DOTALL)
_LONGEST_NAME = 255  # bytes, of every usual file system
_ABANDONED = 24 * 3600  # seconds after which nothing writes a file, where locks do not tell
# What file systems answer that cannot make the names in a folder durable.
_NO_FOLDER_SYNC = {
    errno.EACCES,
    errno.EINVAL,
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.EPERM,
}


def is_partial(name: str) -> bool:
    """Whether a file of this name is one that `durable_file` had begun."""
    return _PARTIAL.fullmatch(name) is not None


@contextmanager
def durable_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that replaces `path` when the block ends, and leaves no trace when it fails.

    What is replaced is the name: a link there is not followed, and other names of its file keep
    their content. Of several writers of one path the last wins.
    Raises OSError naming path; WanExportError when it is written but may not outlast a power cut.
    """
    with naming(path):
        partial, file = _create(path)
        try:
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                if not _has_locks():  # Windows, which renames no open file
                    file.close()
                _replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    try:
        fsync_folder(path.parent)
    except OSError as error:
        raise WanExportError(
            f"{path} is written, but a power cut may take it: its folder cannot be synced "
            f"({error.strerror}); look after the disk"
        ) from error


def write_durably(path: Path, content: bytes) -> None:
    """Write a file whole. Raises as `durable_file` does."""
    with durable_file(path) as file:
        file.write(content)


def check_writable(path: Path) -> None:
    """Raise OSError where `durable_file` could not begin, without touching what is there."""
    with naming(path):
        partial, file = _create(path)
        file.close()
        partial.unlink()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have an OSError that names no file name this one."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where its file system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise OSError(error.errno, error.strerror, str(folder)) from error


def own_folder(parent: Path, name: str) -> Path:
    """The folder of this name in parent, made if there is none.

    Raises WanExportError when something else is in its place, a link to a folder too: what is
    written there would land elsewhere.
    """
    folder = parent / name
    folder.mkdir(parents=True, exist_ok=True)
    if folder.is_symlink():
        raise WanExportError(f"{folder} is a link: put a folder in its place")
    return folder


def remove_partials(folder: Path, is_ours: Callable[[str], bool] = is_partial) -> None:
    """Remove the files that killed writers had begun in a folder, as far as that is allowed.

    What is being written is left, and so is all that is no regular file. On Windows all is left: it
    has no locks that tell, and opens no name in an open folder.
    """
    if not hasattr(os, "O_DIRECTORY"):
        return
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            for name in filter(is_ours, os.listdir(handle)):
                with suppress(OSError):
                    remove_if_abandoned(name, handle)
        finally:
            os.close(handle)


def remove_if_abandoned(name: str, folder: int) -> bool:
    """Remove a regular file that no process is writing; folder is an open one's descriptor.

    Returns whether it is gone. Raises OSError as opening and unlinking do.
    """
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with open(os.open(name, flags, dir_fd=folder), "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            return False
        try:
            _flock(file)
        except BlockingIOError:
            return False
        except OSError:
            if time.time() - status.st_mtime < _ABANDONED:
                return False
        os.unlink(name, dir_fd=folder)
    return True


def _create(path: Path) -> tuple[Path, BinaryIO]:
    """A new file beside path, open and locked for writing."""
    with suppress(FileNotFoundError):
        os.lstat(path)  # refuses a name that is too long, which the new file's would hide
    while True:
        tail = f".{secrets.token_hex(4)}.partial"
        stem = os.fsencode(path.name)[: _LONGEST_NAME - len(tail)].decode(errors="ignore")
        partial = path.with_name(stem + tail)
        try:
            file = partial.open("xb")
        except FileExistsError:
            continue
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        if _is_ours(file):
            return partial, file
        file.close()
        partial.unlink(missing_ok=True)


def _has_locks() -> bool:
    """Whether the system has the locks of `_flock`: Windows, where bundles are read, has not."""
    return find_spec("fcntl") is not None


def _flock(file: BinaryIO) -> None:
    """Lock a file; BlockingIOError says that another has it, OSError that nothing locks here."""
    if not _has_locks():
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    import fcntl

    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_ours(file: BinaryIO) -> bool:
    """Lock a new file; False when one that removes leftovers came first."""
    try:
        _flock(file)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return os.fstat(file.fileno()).st_nlink > 0


def _replace(partial: Path, path: Path) -> None:
    try:
        partial.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
