"""Children of builds, and commands, as forks of one process that has imported their libraries.

A command of a user runs in a fresh interpreter, and so does each child of it, which spends seconds
on imports. Of the tests, only those that are about these processes need that: see `fresh_processes`
in session.py, and README's `make demo`. A fork has no more of a test than a fresh process: it comes
from a server that ran nothing else.
"""

import hashlib
import json
import os
import runpy
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver, get_context
from pathlib import Path
from threading import Lock
from types import ModuleType

from tests.examined import examine_once
from tests.locked import locked
from tests.packaged import package_once
from tests.translated import translate_once
from wanexport.exporter.child import child as product
from wanexport.exporter.child.process import Ended, Lifeline
from wanexport.exporter.child.process import run_command as run_fresh
from wanexport.exporter.cli import main as cli

_COMPILE = "wanexport.exporter.backends.aoti.compile"
_OWN = (  # variables that differ between children of the same settings
    "KINETO_LOG_LEVEL",  # set by a profile
    "LD_LIBRARY_PATH",  # set when TensorRT for RTX is imported, for what is started later
    "ORT_DISABLE_TELEMETRY",  # set when ONNX Runtime is imported
    "PYTEST_CURRENT_TEST",
    "PYTHONPATH",  # a fork takes it up, as far as nothing of it is imported yet
    "TMPDIR",
    "TORCHINDUCTOR_CACHE_DIR",
    "TRITON_CACHE_DIR",
)


class Forks:
    """Runs commands as `run_command` does; folder is for what was compiled already."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._lock = folder, Lock()
        self._packages = folder / "packages"
        self._packages.mkdir(exist_ok=True)
        self._environment = _settings(os.environ)
        self._context = get_context("forkserver")
        self._context.set_forkserver_preload(["tests.preloaded"])

    def run_program(
        self, command: Sequence[str], folder: Path, environment: Mapping[str, str]
    ) -> Ended:
        """Run `wanexport ARGUMENTS` or `python FILE.py ARGUMENTS` in a folder."""
        with tempfile.TemporaryDirectory() as scratch:
            return self._fork(_program, (list(command), self.folder), dict(environment),
                              Path(scratch), at=folder)  # fmt: skip

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
        if _settings(set_up) != self._environment or _is_measured(command):
            return run_fresh(
                command, environment=environment, lifeline=lifeline, folders=folders,
                timeout=timeout, on_line=on_line,
            )  # fmt: skip
        module, job = command[3:]
        with tempfile.TemporaryDirectory() as folder:
            if module == _COMPILE:
                ended = self._compile(Path(job), set_up, Path(folder))
            else:
                ended = self._fork(_module, (module, job), set_up, Path(folder), timeout)
        if on_line is None:
            return ended
        for line in ended.output.splitlines(keepends=True):
            on_line(line)
        return Ended(ended.code, "", ended.errors)

    def _fork(
        self,
        work: Callable[..., None],
        arguments: tuple[object, ...],
        environment: dict[str, str],
        folder: Path,
        timeout: float | None = None,
        at: Path | None = None,
    ) -> Ended:
        """Do the work in a fork that begins at a folder; the other is for what it says."""
        output, errors = folder / "output", folder / "errors"
        output.touch()
        errors.touch()
        place = (str(at or Path.cwd()), environment, str(output), str(errors))
        child = self._context.Process(target=_become, args=(place, work, arguments))
        with self._lock, _no_main():
            child.start()
        child.join(timeout)
        if child.is_alive():
            child.kill()
            child.join()
            raise TimeoutError(f"{arguments[0]} took over {timeout:g} s and was stopped")
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
            ended = self._fork(_package, (str(job), self._packages), environment, folder)
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


Place = tuple[str, dict[str, str], str, str]  # folder, environment, files for output and errors


def _become(place: Place, work: Callable[..., None], arguments: tuple[object, ...]) -> None:
    """Do the work as a process of its own would, its output and errors in files."""
    folder, environment, *files = place
    for number, path in enumerate(files, 1):
        os.dup2(os.open(path, os.O_WRONLY), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    tempfile.tempdir = None
    known = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:0] = [path for path in known if path not in sys.path]
    work(*arguments)


def _module(name: str, job: str) -> None:
    """Run `python -m NAME JOB`."""
    sys.argv = [name, job]
    sys.modules.pop(name, None)
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _package(job: str, folder: Path) -> None:
    """Compile a package, or take one of a call that was traced the same."""
    package_once(folder)
    _module(_COMPILE, job)


def _program(command: list[str], folder: Path) -> None:
    """Run a program whose children are forks of the same server."""
    # It is the server's child, which knows the server's address and would start another.
    forkserver._forkserver.ensure_running = lambda: None  # type: ignore[method-assign]
    forks = Forks(folder)
    product.run_command = forks.run_command  # type: ignore[attr-defined]
    translate_once(folder)
    examine_once(folder)
    if command[0] == "wanexport":
        sys.argv = command
        cli.main()
    else:
        sys.argv = command[1:]
        sys.path.insert(0, str(Path(command[1]).parent.resolve()))
        runpy.run_path(command[1], run_name="__main__")


@contextmanager
def _no_main() -> Iterator[None]:
    """What is started within does not import what this process runs as `__main__`."""
    own = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = own
