"""The one exception type for what a user can put right, and the warning beside it."""

from pathlib import Path


class WanExportError(ValueError):
    """A mistake the user can put right; the message is one line: what is wrong, and what to do."""


class WanExportWarning(UserWarning):
    """Something works, but not as well as it could; the message is one line, as an error's."""


def refuse_empty(**names: str | Path | None) -> None:
    """Raise WanExportError for a name or path that is an empty text, which would be `.` as a path.

    It is what a script's variable has that was never set.
    """
    for what, name in names.items():
        if isinstance(name, str) and not name.strip():
            raise WanExportError(f"{what} is empty: name one, or leave it out")
