"""A bundle in huggingface_hub's cache: every file is a link to a blob named by its hash."""

import hashlib
import os
import shutil
from pathlib import Path


def as_snapshot(bundle: Path, cache: Path) -> Path:
    """The folder of the snapshot in a cache folder; its links are relative, as the hub's are."""
    snapshot, blobs = cache / "snapshots" / ("0123456789" * 4), cache / "blobs"
    blobs.mkdir(parents=True)
    for file in (path for path in bundle.rglob("*") if path.is_file()):
        blob = blobs / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blob)
        link = snapshot / file.relative_to(bundle)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot
