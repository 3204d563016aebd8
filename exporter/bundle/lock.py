"""The lock that keeps a bundle to one writer at a time."""

import errno
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from wanexport.runtime.errors import BadRequest, EngineFailure, WanExportWarning

LOCK = ".lock"
SOFT_LOCK = ".lock.soft"  # a name of its own: the other's file stays behind, and would look held
# What file systems answer that have no locks.
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}


@contextmanager
def bundle_lock(bundle: Path, *, waits: bool = False) -> Iterator[None]:
    """Hold the bundle against other writers; with waits, once the one at work has ended.

    Where the file system has no locks, a file that names the holder stands for one, with a
    WanExportWarning. It is taken over from a holder of this machine that was killed.
    Raises EngineFailure when another writer is at work, BadRequest when the lock is no regular
    file, OSError where no file can be written.
    """
    lock = _take(bundle, waits)
    try:
        yield
    finally:
        lock.release()


def _take(bundle: Path, waits: bool) -> BaseFileLock:
    _check_regular(bundle / LOCK)
    # Its own fallback answers to ENOSYS alone, and takes the file of the other kind for held.
    lock = FileLock(bundle / LOCK, fallback_to_soft=False)
    try:
        return _acquire(lock, bundle, waits)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    warnings.warn(
        f"the file system of {bundle} has no locks: the file {SOFT_LOCK} stands for one, which "
        f"other machines may see too late; build from one machine at a time",
        WanExportWarning,
        stacklevel=4,
    )
    _check_regular(bundle / SOFT_LOCK)
    return _acquire(SoftFileLock(bundle / SOFT_LOCK), bundle, waits)


def _acquire(lock: BaseFileLock, bundle: Path, waits: bool) -> BaseFileLock:
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        held = EngineFailure(
            f"another wanexport is writing {bundle}: wait for it to end"
            + (f", or delete {lock.lock_file} if none is" if isinstance(lock, SoftFileLock) else "")
        )
        if not waits or isinstance(lock, SoftFileLock):  # of another machine, it may never go
            raise held from error
        warnings.warn(
            f"another wanexport is writing {bundle}: waiting for it to end",
            WanExportWarning,
            stacklevel=5,
        )
        try:
            lock.acquire(timeout=-1)
        except RuntimeError:  # this very thread holds it, and would wait for ever
            raise held from error
    return lock


def _check_regular(path: Path) -> None:
    """Raise BadRequest for what locking would follow, wait for or fail at."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        raise BadRequest(f"{path} is no regular file, which a lock is: remove it")
