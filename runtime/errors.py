"""The one exception type for what a user can put right, and the warning beside it."""


class WanExportError(ValueError):
    """A mistake the user can put right; the message is one line: what is wrong, and what to do."""


class WanExportWarning(UserWarning):
    """Something works, but not as well as it could; the message is one line, as an error's."""
