"""Work in a process of its own: for what must see nothing of this one, or not take it along.

The child is one of our modules with a job in JSON; it prints its result as JSON, or fails with one
line.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Any

from wanexport.runtime.errors import WanExportError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_USERS = 2  # exit code of a child that failed for a reason its user can put right


def run_process(module: str, job: "DataclassInstance", folder: Path) -> dict[str, Any]:
    """Run a module of the exporter on a job, with its file in the folder, and return its result.

    Raises WanExportError with the child's own words, or saying that it crashed; RuntimeError with
    its traceback when it failed for no reason that the user can put right.
    """
    with NamedTemporaryFile("w", dir=folder, prefix=f"{module}-", suffix=".json") as file:
        json.dump(asdict(job), file)
        file.flush()
        # -P: a file in the working directory must not stand in for a library.
        command = [sys.executable, "-P", "-m", f"wanexport.exporter.{module}", file.name]
        child = subprocess.run(command, capture_output=True, text=True)
    if child.returncode == -signal.SIGKILL:
        raise WanExportError("a process of this build was killed: out of memory?")
    if child.returncode < 0:
        raise WanExportError(
            f"a fresh process crashed with signal {-child.returncode}: what was built cannot be "
            f"used; try another C++ compiler with CXX, or report this"
        )
    if child.returncode == _USERS:
        raise WanExportError(child.stderr.strip().splitlines()[-1])
    if child.returncode:
        raise RuntimeError(f"{module} failed:\n{child.stderr}")
    result: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return result


def main(path: str, work: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The child's side: do the job and print the result."""
    try:
        print(json.dumps(work(json.loads(Path(path).read_text()))))
    except WanExportError as error:
        print(error, file=sys.stderr)
        sys.exit(_USERS)
