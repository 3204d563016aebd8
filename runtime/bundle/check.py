"""Whether the files of a bundle are those that its manifest lists."""

import hashlib
import io
from dataclasses import replace
from pathlib import Path

from wanexport.runtime.bundle.manifest import FileRecord, WeightsRecord
from wanexport.runtime.bundle.pinned_file import PinnedFile, pin
from wanexport.runtime.bundle.tensorfile import header_sha256
from wanexport.runtime.errors import BundleError, WanExportError

_CHUNK = 1 << 24


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read in chunks."""
    with path.open("rb", buffering=0) as file:
        return _sha256(file)


def _sha256(file: io.FileIO) -> str:
    digest, buffer = hashlib.sha256(), bytearray(_CHUNK)
    while count := file.readinto(buffer):
        digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def check_size(bundle: Path, file: FileRecord) -> PinnedFile:
    """Return the file as it is now.

    Raises BundleError when it is missing, no regular file, not readable, or of another size.
    """
    path = bundle / file.path
    try:
        pinned = pin(path)
    except WanExportError as error:
        if not isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            raise
        raise BundleError(
            f"{path} is missing from the bundle: run the same wanexport build again"
        ) from error
    if pinned.identity.size != file.size:
        raise BundleError(
            f"{path} has {pinned.identity.size} bytes, the manifest says {file.size}: "
            f"run the same wanexport build again"
        )
    return pinned


def check_weights(bundle: Path, record: WeightsRecord) -> PinnedFile:
    """Return the weights' file after checking size and header, not every byte.

    Raises BundleError when the file is missing or another one.
    """
    pinned = check_size(bundle, record.file)
    with pinned.opened() as descriptor:
        found = header_sha256(descriptor)
    if found != record.layout:
        raise BundleError(
            f"{pinned.path} has another header than the manifest says: run wanexport build again"
        )
    return pinned


def check_content(bundle: Path, file: FileRecord) -> PinnedFile:
    """Return the file after hashing it whole.

    Raises BundleError when it is missing or was altered.
    """
    pinned = check_size(bundle, file)
    with pinned.opened() as descriptor, open(descriptor, "rb", buffering=0, closefd=False) as raw:
        found = _sha256(raw)
    if found != file.sha256:
        raise BundleError(f"{pinned.path} was altered after the build: run wanexport build again")
    return replace(pinned, sha256=found)
