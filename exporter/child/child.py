"""Work in a process of its own: for what must see nothing of this one, or not take it along.

The child is one of our modules with a job in JSON. On its standard output it tells its progress and
then its result, or why there is none: in lines of a form of their own, as libraries print too, and
not in files, as a disk may be full.
"""

import errno
import json
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Any

from wanexport.exporter.child.process import (
    Ended,
    Lifeline,
    environment_of,
    last_words,
    run_command,
)
from wanexport.runtime.errors import WanExportError
from wanexport.runtime.machine.temporary import PREFIX, marked_folder

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_USERS = 2  # exit code of a child that failed for a reason its user can put right
_OURS = "wanexport says "  # how a line begins that is for the parent
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_WORDS = ("No space left on device", "Disk quota exceeded", "File too large")
_NO_MEMORY = ("out of memory", "can't allocate memory", "std::bad_alloc")


def run_process(
    module: str,
    job: "DataclassInstance",
    folder: Path | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    advice: str = "please report this",
    *,
    lifeline: Lifeline | None = None,
    environment: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> dict[str, Any]:
    """Run a module of the exporter on a job and return its result.

    folder is a temporary one that the job names, for what the child writes: it is removed if this
    process is killed, as is what the child keeps elsewhere. progress is called with what the child
    tells by `tell`; advice is for a crash; environment adds variables.
    Raises WanExportError with the child's own words, or saying how it ended, and TimeoutError when
    it takes over timeout seconds.
    """
    said: dict[str, Any] = {}
    with temporary_folder() as scratch:
        path = scratch / "job.json"
        _write_job(path, job)
        # -P: a file in the working directory must not stand in for a library.
        command = [sys.executable, "-P", "-m", f"wanexport.exporter.{module}", str(path)]
        ended = run_command(
            command,
            environment={**environment_of(scratch), **(environment or {})},
            lifeline=lifeline,
            folders=[scratch] if folder is None else [scratch, folder],
            timeout=timeout,
            on_line=lambda line: _hear(line, said, progress),
        )
    if "result" in said and ended.code == 0:
        result: dict[str, Any] = said["result"]
        return result
    raise WanExportError(_reason(module, said, ended, advice))


def _hear(line: str, said: dict[str, Any], progress: Callable[[str, int, int], None]) -> None:
    """Take what a line of a child's output says to its parent, if anything."""
    if not line.startswith(_OURS):
        return
    message = json.loads(line.removeprefix(_OURS))
    if "progress" in message:
        progress(*message["progress"])
    else:
        said.update(message)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A temporary folder for all that a child writes beside its results.

    Raises WanExportError when nothing can be written there.
    """
    stack = ExitStack()
    try:
        folder = stack.enter_context(marked_folder())
    except OSError as error:  # with no file's name where no folder at all would do
        place = f"{Path(error.filename).parent}: " if error.filename else ""
        raise WanExportError(
            f"there is no folder for temporary files ({place}{error.strerror}): set TMPDIR to one "
            f"that can be written"
        ) from error
    with stack:
        yield folder


def _write_job(path: Path, job: "DataclassInstance") -> None:
    try:
        path.write_text(json.dumps(asdict(job)))
    except OSError as error:
        raise WanExportError(_cannot_write(path.parent, error)) from error


def _cannot_write(path: Path, error: OSError) -> str:
    # The folder of one process is gone by the time that this is read: the one that it lay in stays.
    own = (folder for folder in (path, *path.parents) if folder.name.startswith(PREFIX))
    place = next((folder.parent for folder in own), path)
    return (
        f"{place} takes no more ({error.strerror}): free some space there, or set TMPDIR to "
        f"another folder"
    )


def _reason(module: str, said: Mapping[str, Any], ended: Ended, advice: str) -> str:
    """Why a child gave no result, in one line; what nobody foresaw is kept in a file."""
    if "error" in said and "traceback" not in said:
        return str(said["error"])
    if ended.code == -signal.SIGKILL:
        return f"{module}: {last_words(ended.code, '')}"
    if ended.code < 0:
        return f"{module}: {last_words(ended.code, '')}; {advice}"
    words = said.get("error") or last_words(ended.code, ended.errors)
    log = _keep(f"{ended.errors}\n{said.get('traceback', '')}", f"{PREFIX}{module}-")
    return f"{module} failed ({words}): this is a fault of wanexport or of a library; report {log}"


def _keep(text: str, prefix: str) -> str:
    """Write what the user may report into a file that stays, and return what to call it."""
    try:
        with NamedTemporaryFile("w", prefix=prefix, suffix=".log", delete=False) as file:
            file.write(text)
        return f"it with {file.name}"
    except OSError:
        return "it"


def tell(stage: str, done: int, total: int) -> None:
    """The child's side: show its progress to the parent; total is 0 when it is unknown."""
    _say({"progress": [stage, done, total]})


def _say(message: dict[str, Any]) -> None:
    # A line that a library began is not continued.
    sys.stdout.write(f"\n{_OURS}{json.dumps(message)}\n")
    sys.stdout.flush()


def main(path: str, work: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The child's side: do the job and say the result, or in one line why there is none."""
    try:
        _say({"result": work(json.loads(Path(path).read_text()))})
    except Exception as error:
        words = known(error)
        if words is None:
            words = f"{type(error).__name__}: {_in_one_line(error)}"
            _say({"error": words, "traceback": traceback.format_exc()})
            raise
        _say({"error": words})
        print(words, file=sys.stderr)
        sys.exit(_USERS)


def known(error: BaseException) -> str | None:
    """What to tell of an error that the user can put right; None of any other."""
    if isinstance(error, WanExportError):
        return str(error)
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for link in chain:
        if isinstance(link, OSError) and link.errno in _FULL:
            return _cannot_write(Path(link.filename or tempfile.gettempdir()), link)
        if isinstance(link, MemoryError) or any(words in str(link) for words in _NO_MEMORY):
            return (
                f"out of memory ({_in_one_line(link)}): close what else uses it, or take a smaller "
                f"--resolution or fewer --frames"
            )
    for words in _FULL_WORDS:  # as a compiler says it
        if any(words in str(link) for link in chain):
            return _cannot_write(Path(tempfile.gettempdir()), OSError(errno.ENOSPC, words))
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, ImportError):
        return f"a library does not import ({_in_one_line(error)}): see wanexport doctor"
    return None


def _in_one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
