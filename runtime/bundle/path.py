"""Which paths a manifest may name: those of an artefact, inside the bundle."""

import os
from pathlib import PurePosixPath

ARTEFACTS = ("weights", "engines")  # the folders of what a manifest lists
WEIGHTS_FILE = "denoiser.safetensors"  # in the folder of each expert of a weights set
RESERVED = {  # the bundle's own names
    "manifest.json",
    "manifest.partial.json",
    "manifest.replaced.json",
    ".lock",
    ".lock.soft",
    ".unfinished",
}
_MAX_PATH, _MAX_COMPONENT = 1024, 255  # bytes


def check_path(path: str) -> None:
    """Raise ValueError unless it is the plain relative path of an artefact."""
    parts = PurePosixPath(path).parts
    if path.startswith("/") or ".." in parts:
        raise ValueError(f"{path!r:.80} lies outside the bundle")
    # To Windows a backslash is a separator, and a colon begins a drive's path or a hidden stream.
    is_plain = path.isprintable() and not {*"\\:"} & {*path} and str(PurePosixPath(path)) == path
    sizes = [len(os.fsencode(part)) for part in parts] if is_plain else []
    if not sizes or max(sizes) > _MAX_COMPONENT or sum(sizes) + len(sizes) > _MAX_PATH:
        raise ValueError(f"{path!r:.80} is no path of a file in the bundle")
    if RESERVED & {part.lower() for part in parts}:
        raise ValueError(f"{path!r:.80} has a name that is the bundle's own")
