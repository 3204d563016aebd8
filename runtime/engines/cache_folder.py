"""The user's own folder for what engines can make again: compiled kernels, measured times.

It is code, and no manifest says what it should be. So it is kept where nobody else can write, and
nothing of the kind that a bundle brings is read.
"""

import os
import stat
import warnings
from pathlib import Path

from wanexport.runtime.errors import WanExportWarning


def cache_folder() -> Path | None:
    """The folder, made where there is none; None, with a warning, where it cannot be trusted."""
    from platformdirs import user_cache_path

    folder = user_cache_path("wanexport")
    try:
        obstacle = _obstacle(folder)
    except OSError as error:
        obstacle = error.strerror or str(error)
    if not obstacle:
        return folder
    warnings.warn(
        f"compiled kernels are not kept in {folder} ({obstacle}): the next load compiles anew",
        WanExportWarning,
        stacklevel=2,
    )
    return None


def _obstacle(folder: Path) -> str:
    """Why what lies in the folder may not be this user's; empty when it is."""
    if not folder.is_absolute():
        return "this user has no home folder: set XDG_CACHE_HOME"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if not hasattr(os, "getuid"):  # Windows keeps a user's folders from others
        return ""
    if found.st_uid != os.getuid():
        return "it is another user's: set XDG_CACHE_HOME"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "others may write there: chmod go-w it"
    return ""
