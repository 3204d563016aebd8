"""Work in a process of its own: for what must see nothing of this one, or not take it along.

The child is one of our modules with a job in JSON; it prints its progress and then its result as
JSON, or fails with one line.
"""

import ctypes
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryFile
from typing import TYPE_CHECKING, Any

from wanexport.runtime.errors import WanExportError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_USERS = 2  # exit code of a child that failed for a reason its user can put right
_PROGRESS = '{"progress": '  # how a line begins that is not the result
_SET_PARENT_DEATH_SIGNAL = 1  # of Linux's prctl


def run_process(
    module: str,
    job: "DataclassInstance",
    folder: Path,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    advice: str = "for an aoti engine try another C++ compiler with CXX, else report this",
) -> dict[str, Any]:
    """Run a module of the exporter on a job, with its file in the folder, and return its result.

    progress is called with what the child tells by `tell`; advice is for a crash.
    Raises WanExportError with the child's own words, or saying that it crashed; RuntimeError with
    its traceback when it failed for no reason that the user can put right.
    """
    with NamedTemporaryFile("w", dir=folder, prefix=f"{module}-", suffix=".json") as file:
        json.dump(asdict(job), file)
        file.flush()
        # -P: a file in the working directory must not stand in for a library.
        command = [sys.executable, "-P", "-m", f"wanexport.exporter.{module}", file.name]
        code, last, errors = _run(command, progress)
    if code == -signal.SIGKILL:
        raise WanExportError("a process of this build was killed: out of memory?")
    if code < 0:
        raise WanExportError(
            f"a fresh process crashed with signal {-code}: what was built cannot be used; {advice}"
        )
    if code == _USERS:
        raise WanExportError(errors.strip().splitlines()[-1])
    if code:
        raise RuntimeError(f"{module} failed:\n{errors}")
    result: dict[str, Any] = json.loads(last)
    return result


def _run(command: list[str], progress: Callable[[str, int, int], None]) -> tuple[int, str, str]:
    """Exit code, last line of the output, and what went to standard error."""
    last = ""
    # A file takes any amount of errors; a second pipe could fill while the first is read.
    with TemporaryFile("w+", errors="replace") as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as child:
            assert child.stdout is not None
            try:
                for line in child.stdout:
                    if line.startswith(_PROGRESS):
                        progress(*json.loads(line)["progress"])
                    else:
                        last = line
            except BaseException:
                child.kill()
                raise
        errors.seek(0)
        return child.returncode, last, errors.read()


def tell(stage: str, done: int, total: int) -> None:
    """The child's side: show its progress to the parent; total is 0 when it is unknown."""
    print(json.dumps({"progress": [stage, done, total]}), flush=True)


def main(path: str, work: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The child's side: do the job and print the result; a parent that is killed takes it along."""
    # Else it would hold memory and GPU, and write into a bundle that the next try is writing.
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    try:
        print(json.dumps(work(json.loads(Path(path).read_text()))))
    except WanExportError as error:
        print(error, file=sys.stderr)
        sys.exit(_USERS)
