"""Whether a file that a comparison is to save can be written."""

import os
from pathlib import Path

from wanexport.runtime.errors import BadRequest


def check_output(path: Path, option: str, suffix: str, reason: str, *, overwrite: bool) -> None:
    """Refuse before the work what could not be saved after it; reason says why the suffix.

    option is what names the file. Raises BadRequest, for a file that is there too unless overwrite.
    """
    if path.suffix != suffix or path.is_dir():
        raise BadRequest(f"{path}: {reason}, name a {suffix} file")
    if not os.access(path.parent, os.W_OK):
        raise BadRequest(f"cannot write in {path.parent}: name an existing folder")
    if os.path.lexists(path) and not overwrite:
        raise BadRequest(f"{path} exists: name another {option}, or add --overwrite")
