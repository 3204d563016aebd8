"""The one exception type for what a user can put right, and the warning beside it."""

import errno

_FULL = {errno.ENOSPC, errno.EDQUOT}


class WanExportError(ValueError):
    """A mistake the user can put right; the message is one line: what is wrong, and what to do."""


class WanExportWarning(UserWarning):
    """Something works, but not as well as it could; the message is one line, as an error's."""


def explain(error: Exception) -> str:
    """An error in one line; one of the system with its path, reason, and what helps a full disk."""
    if not isinstance(error, OSError):
        return str(error)
    line = error.strerror or str(error) or type(error).__name__
    if error.filename is not None:
        line = f"{error.filename}: {line}"
    if error.errno in _FULL:
        line += ": free space on its disk, or write elsewhere with -o (reports: --report)"
    return line
