"""The one exception type for what a user can put right."""


class WanExportError(ValueError):
    """A mistake in what was asked: one line saying what was wrong, what was expected, what to do."""
