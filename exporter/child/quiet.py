"""Silence for what libraries say of themselves, which is not the user's to act on."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet(logger: str) -> Iterator[None]:
    """Within the block, no warnings, and of this logger errors only."""
    notices = logging.getLogger(logger)
    level = notices.level
    notices.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        notices.setLevel(level)
