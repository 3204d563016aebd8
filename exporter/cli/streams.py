"""Standard output and error as a shell may hand them over: closed, full, or with no reader left."""

import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from wanexport.runtime.errors import WanExportError

# What a shell gives for a program that SIGPIPE ended, as `head` ends one. 1 is a failed check.
READER_GONE = 141


def prepare_streams() -> None:
    """Take any character, and keep the standard descriptors from becoming some file's.

    Raises WanExportError where standard output is closed.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a path may hold what its encoding lacks
            stream.reconfigure(errors="backslashreplace")
    is_closed = sys.stdout is None
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    if is_closed:
        raise WanExportError("standard output is closed: give it a file, or /dev/null")


@contextmanager
def printing() -> Iterator[None]:
    """Where the block prints to standard output, say so when that takes no more.

    Raises WanExportError, but for a reader that has gone: that stays a BrokenPipeError.
    """
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _silence(sys.__stdout__)
        raise WanExportError(
            f"cannot write to standard output ({error.strerror}): send it elsewhere"
        ) from error


@contextmanager
def minding_the_reader() -> Iterator[None]:
    """End the program quietly when what the block prints is read by nobody any more.

    Raises WanExportError for another pipe that broke.
    """
    try:
        yield
    except BrokenPipeError as error:
        gone = [s for s in (sys.__stdout__, sys.__stderr__) if s is not None and _is_unread(s)]
        if not gone:
            raise WanExportError(f"a process that this one talked to has ended: {error}") from error
        _silence(*gone)
        sys.exit(READER_GONE)


def _silence(*streams: TextIO | None) -> None:
    """Drop what the streams still hold, which the interpreter would write when it ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        if stream is not None:
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _is_unread(stream: TextIO) -> bool:
    poll = select.poll()
    poll.register(stream, 0)  # errors are told of in any case
    return any(events & select.POLLERR for _, events in poll.poll(0))
