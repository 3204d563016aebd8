"""Read what other programs may have written: regular files only, and only so many bytes of them.

A pipe or a device in the place of a file would make a reader wait or read for ever.
"""

import os
import stat
from pathlib import Path

from wanexport.runtime.errors import BundleError, printable


def open_regular(path: Path) -> int:
    """A descriptor of a regular file, open for reading; the caller closes it.

    Links are followed. Raises BundleError for a folder, a pipe or a device, and OSError as
    `os.open` does.
    """
    # Without O_NONBLOCK the open itself would wait for a pipe's writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BundleError(f"{printable(path)} is no regular file: put a file in its place")
    return descriptor


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
