"""Whether the files of a bundle are those that its manifest lists."""

import hashlib
from pathlib import Path

from wanexport.runtime.errors import WanExportError
from wanexport.runtime.manifest import FileRecord, WeightsRecord
from wanexport.runtime.tensorfile import header_sha256

_CHUNK = 1 << 24


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read in chunks."""
    digest, buffer = hashlib.sha256(), bytearray(_CHUNK)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def check_size(bundle: Path, file: FileRecord) -> Path:
    """Return the file's path. Raises WanExportError when it is missing or has another size."""
    path = bundle / file.path
    if not path.is_file():
        raise WanExportError(
            f"{path} is missing from the bundle: run the same wanexport build again"
        )
    if path.stat().st_size != file.size:
        raise WanExportError(
            f"{path} has {path.stat().st_size} bytes, the manifest says {file.size}: "
            f"run the same wanexport build again"
        )
    return path


def check_weights(bundle: Path, record: WeightsRecord) -> Path:
    """Return the weights' path after checking size and header, not every byte.

    Raises WanExportError when the file is missing or another one.
    """
    path = check_size(bundle, record.file)
    if header_sha256(path) != record.header_sha256:
        raise WanExportError(
            f"{path} has another header than the manifest says: run wanexport build again"
        )
    return path


def check_content(bundle: Path, file: FileRecord) -> Path:
    """Return the file's path after hashing it whole.

    Raises WanExportError when it is missing or was altered.
    """
    path = check_size(bundle, file)
    if file_sha256(path) != file.sha256:
        raise WanExportError(f"{path} was altered after the build: run wanexport build again")
    return path
