"""The exceptions for what a user can put right, the warning beside them, and their words."""

import errno
import shlex
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from pathlib import Path, PurePath

_FULL = {errno.ENOSPC, errno.EDQUOT}


class WanExportError(ValueError):
    """A mistake the user can put right; the message is one line: what is wrong, and what to do."""


class BadRequest(WanExportError):
    """What the caller asked for cannot be: another value, option or input would work."""


class BundleError(WanExportError):
    """The bundle, or a file or package it needs, is missing, damaged, or not for this machine."""


class EngineFailure(WanExportError):
    """A fitting request to a good bundle failed: memory, the GPU, or what was closed meanwhile.

    The same request may succeed later, or elsewhere.
    """


class WanExportWarning(UserWarning):
    """Something works, but not as well as it could; the message is one line, as an error's."""


def needing_extra(extra: str, what: str) -> AbstractContextManager[None]:
    """Around imports that `what` needs of an extra of wanexport (`build,cpu`: of several).

    Makes of their failure a BundleError, in one line: a package that is not there is named with
    what installs it, one that is there and does not import gives its own error.
    """
    # wanexport is on no registry.
    return _needing(what, f"from a clone of wanexport: pip install '.[{extra}]'")


def needing_package(package: str, what: str) -> AbstractContextManager[None]:
    """The same around the import of one package, which is in no extra."""
    return _needing(what, installing(package))


def installing(*requirements: str) -> str:
    """The command that installs packages of a registry, each named as pip takes it."""
    return f"pip install {shlex.join(requirements)}"


@contextmanager
def _needing(what: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except (ImportError, OSError, RuntimeError) as error:  # torch and diffusers raise the latter
        cause = _first(error)
        if name := _missing(cause):
            fault = f"needs {name}; {remedy}"
        else:
            reason = " ".join(str(cause).split())
            fault = (
                f"needs a package that is installed but does not import ({reason}); "
                f"wanexport doctor says which, and what to install"
            )
        raise BundleError(f"{what} {fault}") from error


def _missing(error: BaseException) -> str:
    """The package that an error says is not there; empty when it is, or lacks a part of itself."""
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return ""
    package, _, part = error.name.partition(".")
    return "" if part and find_spec(package) else package


def _first(error: BaseException) -> BaseException:
    """What went wrong first: transformers and diffusers wrap it in errors of their own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


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


def refuse_empty(**names: str | Path | None) -> None:
    """Raise BadRequest for a name or path that is an empty text, which would be `.` as a path.

    It is what a script's variable has that was never set.
    """
    for what, name in names.items():
        if isinstance(name, str) and not name.strip():
            raise BadRequest(f"{what} is empty: name one, or leave it out")


_LONGEST_PATH = 4096
_SHOWN = 120  # characters of one text in a line


def printable(value: object, at_most: int = _SHOWN) -> str:
    """One line of printable characters; others (line ends, ESC, bidi marks) are escaped.

    The middle of a text of more than at_most characters is left out: its end may say what to do. A
    path is whole, to be copied.
    """
    if isinstance(value, PurePath):
        at_most = max(at_most, _LONGEST_PATH)
    text = _cut(str(value), at_most)
    return _cut("".join(c if c.isprintable() else _escaped(c) for c in text), at_most)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _cut(text: str, at_most: int) -> str:
    if len(text) <= at_most:
        return text
    tail = at_most // 3
    return f"{text[: at_most - tail - 5]} ... {text[len(text) - tail :]}"


def first_line(error: BaseException) -> str:
    """What an exception of a library says, without its details."""
    return (str(error).splitlines() or [type(error).__name__])[0]
