"""The one exception type for what a user can put right, the warning beside it, and their words."""

from pathlib import Path


class WanExportError(ValueError):
    """A mistake the user can put right; the message is one line: what is wrong, and what to do."""


class WanExportWarning(UserWarning):
    """Something works, but not as well as it could; the message is one line, as an error's."""


def shown(text: object, limit: int = 120) -> str:
    """A text that came from a file or a caller, fit for a message: escaped, and cut at the limit.

    What is not printable (a newline, a control character) is written as in a Python string. A path
    is shown whole.
    """
    whole = str(text)
    cut = whole if len(whole) <= limit or isinstance(text, Path) else f"{whole[:limit]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)
