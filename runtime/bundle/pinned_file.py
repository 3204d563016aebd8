"""A file that was looked at: when it is opened later, it must still be the same.

What was checked is then what is opened, whatever others do to the bundle's folder meanwhile.
"""

import hashlib
import os
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from wanexport.runtime.bundle.regular_file import open_regular
from wanexport.runtime.errors import BundleError


class Identity(NamedTuple):
    """Which content a file has, as far as the file system tells without reading it."""

    device: int
    inode: int
    size: int  # bytes
    modified: int  # nanoseconds


@dataclass(frozen=True)
class PinnedFile:
    """A regular file as it was at one moment; `path` may be a link to it.

    `sha256` is that of its content where it was hashed, and empty elsewhere.
    """

    path: Path
    identity: Identity
    sha256: str = ""

    @property
    def content(self) -> Hashable:
        """What tells its content from another, as far as is known without reading it."""
        return self.identity

    @contextmanager
    def opened(self) -> Iterator[int]:
        """A descriptor of the file, to which the path leads before the block and after it.

        Raises BundleError when the file went or was changed, and when it cannot be read.
        """
        descriptor = _open(self.path)
        try:
            self.check(descriptor)
            yield descriptor
            self.check()
        except OSError as error:
            raise BundleError(_refusal(self.path, error)) from error
        finally:
            os.close(descriptor)

    def check(self, descriptor: int | None = None) -> None:
        """Raise BundleError unless what the descriptor, or the path, leads to is the same."""
        try:
            found = os.stat(self.path if descriptor is None else descriptor)
        except OSError as error:
            raise BundleError(_refusal(self.path, error)) from error
        if _identity(found) != self.identity:
            raise BundleError(f"{self.path} was changed since it was checked: load it again")

    def read(self) -> bytes:
        """The whole content. Raises BundleError when it is not what was hashed."""
        with self.opened() as descriptor, open(descriptor, "rb", closefd=False) as file:
            content = file.read()
        if self.sha256 and hashlib.sha256(content).hexdigest() != self.sha256:
            raise BundleError(f"{self.path} was changed since it was checked: load it again")
        return content


def pin(file: Path | PinnedFile) -> PinnedFile:
    """The file as it is now; what is pinned already stays as it was.

    Raises BundleError when there is none, it is no regular file, or it cannot be opened.
    """
    if isinstance(file, PinnedFile):
        return file
    descriptor = _open(file)
    try:
        return pin_opened(file, descriptor)
    finally:
        os.close(descriptor)


def pin_opened(path: Path, descriptor: int) -> PinnedFile:
    """The file that a path led to when it was opened, as it is now."""
    return PinnedFile(path, _identity(os.fstat(descriptor)))


def _identity(found: os.stat_result) -> Identity:
    return Identity(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def _open(path: Path) -> int:
    try:
        return open_regular(path)
    except OSError as error:
        raise BundleError(_refusal(path, error)) from error


def _refusal(path: Path, error: OSError) -> str:
    return f"cannot read {path} ({error.strerror or error}): put the file back, or build again"
