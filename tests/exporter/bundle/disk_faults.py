"""A disk that is full, and a process that dies, at the N-th operation on files.

Operations are counted by an audit hook, which is told of them before they happen; bytes are counted
where our files are written.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import ENOSPC
from pathlib import Path
from typing import Any, BinaryIO
from unittest.mock import patch

from wanexport.runtime.bundle import durable

KILLED = 9
_CHANGES = {
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.truncate",
    "os.link",
    "os.symlink",
}
_TAKES_SPACE = {"os.mkdir", "os.rename"}


class _Watch:
    """What happens at the next operations; there is one, for a hook cannot be taken off."""

    fault: Callable[[Any], None] | None = None
    left = 0
    only_space = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _Watch.fault is None:
        return
    is_open = event == "open"
    if _Watch.only_space:
        creates = is_open and isinstance(arguments[2], int) and arguments[2] & os.O_CREAT
        counted = creates or event in _TAKES_SPACE
    else:
        counted = is_open or event in _CHANGES
    if not counted:
        return
    _Watch.left -= 1
    if _Watch.left == 0:
        _Watch.fault(arguments[0])


sys.addaudithook(_hook)


@contextmanager
def _watching(at: int, fault: Callable[[Any], None], *, only_space: bool) -> Iterator[None]:
    _Watch.left, _Watch.only_space, _Watch.fault = at, only_space, fault
    try:
        yield
    finally:
        _Watch.fault = None


def dies_at(operation: int, work: Callable[[], Any]) -> bool:
    """Do the work in a process that is killed before its N-th operation; whether it came to it."""
    child = os.fork()
    if child == 0:
        try:
            with _watching(operation, lambda name: os._exit(KILLED), only_space=False):
                work()
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, KILLED)
    return code == KILLED


def _no_space(name: Any = None) -> None:
    """What the system raises, which names what was to be made, and no file that is written."""
    raise OSError(ENOSPC, os.strerror(ENOSPC), name)


@contextmanager
def full_at_name(operation: int) -> Iterator[Callable[[], bool]]:
    """A disk that has no room for the N-th new name of a file or folder; says if it was asked."""
    with _watching(operation, _no_space, only_space=True):
        yield lambda: _Watch.left <= 0


class _File:
    """A file of ours on a disk with so many bytes free, which are counted over all files."""

    def __init__(self, file: BinaryIO, free: list[int]) -> None:
        self._file, self._free = file, free

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self._free[0] -= size
        if self._free[0] < 0:
            _no_space()
        return self._file.write(data)

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def full_after(free: int) -> Iterator[None]:
    """A disk that takes so many more bytes of our files."""
    rest, create = [free], durable._create

    def created(path: Path) -> tuple[Path, Any]:
        partial, file = create(path)
        return partial, _File(file, rest)

    with patch.object(durable, "_create", created):
        yield
