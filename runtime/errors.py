"""The one exception type for what a user can put right."""


class WanExportError(ValueError):
    """A mistake the user can put right; the message is one line: what is wrong, and what to do."""
