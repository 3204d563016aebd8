"""Children of builds as forks of one process that has imported their libraries.

A command of a user runs each child in a fresh interpreter, which spends seconds on imports. Of the
tests, only those that are about these processes need that: see `fresh_processes` in conftest.py.
A fork has no more of a test than a fresh child: it comes from a server that ran nothing else.
"""

import fcntl
import hashlib
import json
import os
import runpy
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from threading import Lock

from wanexport.exporter.child.process import Ended, Lifeline
from wanexport.exporter.child.process import run_command as run_fresh

_PRELOADED = (
    "torch._inductor.compile_fx",
    "wanexport.exporter.backends.aoti.compile",
    "wanexport.exporter.backends.aoti.proof_process",
    "wanexport.exporter.backends.onnx.proof_process",
)
_COMPILE = "wanexport.exporter.backends.aoti.compile"
_OWN = (  # variables that differ between children of the same settings
    "ORT_DISABLE_TELEMETRY",  # set when ONNX Runtime is imported
    "PYTEST_CURRENT_TEST",
    "TMPDIR",
    "TORCHINDUCTOR_CACHE_DIR",
    "TRITON_CACHE_DIR",
)


class Forks:
    """Runs commands as `run_command` does; packages is a folder of what was compiled already."""

    def __init__(self, packages: Path) -> None:
        self._packages, self._lock = packages, Lock()
        self._folder, self._environment = os.getcwd(), _settings(os.environ)
        self._context = get_context("forkserver")
        self._context.set_forkserver_preload(list(_PRELOADED))

    def run_command(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        lifeline: Lifeline | None = None,
        folders: Sequence[Path] = (),
        timeout: float | None = None,
        on_line: Callable[[str], None] | None = None,
    ) -> Ended:
        """Run `python -P -m MODULE JOB` in a fork, or where it has other settings as itself."""
        set_up = dict(os.environ if environment is None else environment)
        is_plain = (os.getcwd(), _settings(set_up)) == (self._folder, self._environment)
        if not is_plain or _is_measured(command):
            return run_fresh(
                command, environment=environment, lifeline=lifeline, folders=folders,
                timeout=timeout, on_line=on_line,
            )  # fmt: skip
        module, job = command[3:]
        with tempfile.TemporaryDirectory() as folder:
            if module == _COMPILE:
                ended = self._compile(Path(job), set_up, Path(folder))
            else:
                ended = self._fork(module, job, set_up, Path(folder), timeout)
        if on_line is None:
            return ended
        for line in ended.output.splitlines(keepends=True):
            on_line(line)
        return Ended(ended.code, "", ended.errors)

    def _fork(
        self,
        module: str,
        job: str,
        environment: dict[str, str],
        folder: Path,
        timeout: float | None = None,
    ) -> Ended:
        output, errors = folder / "output", folder / "errors"
        output.touch()
        errors.touch()
        child = self._context.Process(
            target=_become, args=(module, job, environment, str(output), str(errors))
        )
        with self._lock:
            child.start()
        child.join(timeout)
        if child.is_alive():
            child.kill()
            child.join()
            raise TimeoutError(f"{module} took over {timeout:g} s and was stopped")
        code = child.exitcode
        assert code is not None
        return Ended(code, output.read_text(), errors.read_text())

    def _compile(self, job: Path, environment: dict[str, str], folder: Path) -> Ended:
        """Compile a package, or take the one of a job that was the same but for its path."""
        content = json.loads(job.read_text())
        path = Path(content.pop("path"))
        key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        package, output = self._packages / f"{key}.pt2", self._packages / f"{key}.txt"
        with locked(self._packages / f"{key}.lock"):
            if output.exists():
                shutil.copyfile(package, path)
                return Ended(0, output.read_text(), "")
            ended = self._fork(_COMPILE, str(job), environment, folder)
            if ended.code == 0:
                shutil.copyfile(path, package)
                output.write_text(ended.output)
            return ended


def _is_measured(command: Sequence[str]) -> bool:
    """Whether it is of a benchmark, whose memory and start are a fresh process's own."""
    return command[3].startswith("wanexport.exporter.bench.")


def _settings(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without what differs from child to child."""
    return {name: value for name, value in environment.items() if name not in _OWN}


def _become(module: str, job: str, environment: dict[str, str], output: str, errors: str) -> None:
    """Run the module on the job, as `python -m` would, its output and errors in files."""
    for number, path in ((1, output), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY), number)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None
    sys.argv = [module, job]
    sys.modules.pop(module, None)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """The block runs in one process at a time of those that name the same file."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
