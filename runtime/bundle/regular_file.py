"""Read what other programs may have written: regular files only, and only so many bytes of them.

A pipe or a device in the place of a file would make a reader wait or read for ever.
"""

import os
import stat
import threading
from pathlib import Path

from wanexport.runtime.errors import BundleError, printable

_position = threading.Lock()  # of descriptors, where the system cannot read elsewhere


def open_regular(path: Path) -> int:
    """A descriptor of a regular file, open for reading; the caller closes it.

    Links are followed. Raises BundleError for a folder, a pipe or a device, and OSError as
    `os.open` does.
    """
    # Without O_NONBLOCK the open itself would wait for a pipe's writer. Windows has neither pipes
    # among its files nor this flag; there, O_BINARY keeps line ends as they are.
    flags = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, os.O_RDONLY | flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BundleError(f"{printable(path)} is no regular file: put a file in its place")
    return descriptor


def read_into(descriptor: int, view: memoryview, offset: int) -> int:
    """Read from an offset of an open file into view; how many bytes, 0 at its end.

    The descriptor's position stays: several threads may read. Raises OSError as `os.preadv` does.
    """
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [view], offset)
    with _position, open(descriptor, "rb", buffering=0, closefd=False) as file:  # on Windows
        before = file.tell()
        try:
            file.seek(offset)
            return file.readinto(view)
        finally:
            file.seek(before)


def read_regular(path: Path, *, at_most: int) -> bytes:
    """The content of a regular file.

    Raises BundleError when it is none, or holds more than at_most bytes;
    OSError when it cannot be opened or read.
    """
    with open(open_regular(path), "rb") as file:
        content = file.read(at_most + 1)
    if len(content) > at_most:
        raise BundleError(
            f"{printable(path)} is larger than {at_most} bytes, more than such a file takes"
        )
    return content
