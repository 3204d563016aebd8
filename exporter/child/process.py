"""Run another program, so that nothing of it outlives this process, whatever ends this one.

Every process that a command of ours starts is started here, under `supervisor.py`.
"""

import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock, Thread, Timer
from typing import IO

from wanexport.runtime.errors import WanExportError

_SUPERVISOR = Path(__file__).with_name("supervisor.py")
_MOST_ERRORS = 1 << 20  # characters that are kept, from the end
_NAMES = ("LOGNAME", "USER", "LNAME", "USERNAME")  # where `getpass.getuser` looks first


@dataclass(frozen=True)
class Ended:
    """How a program ended: its exit code, or less than 0 the signal, and what it said."""

    code: int
    output: str
    errors: str


class Lifeline:
    """What programs' lives hang on: all that were started with it are killed when its block ends.

    One may be shared by threads that each run a program.
    """

    def __init__(self) -> None:
        self._reading, self._writing = os.pipe()
        self._lock, self._is_cut = Lock(), False

    def __enter__(self) -> "Lifeline":
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._is_cut = True
            os.close(self._writing)
            os.close(self._reading)

    def start(
        self, command: Sequence[str], environment: Mapping[str, str], folders: Sequence[Path]
    ) -> "subprocess.Popen[str]":
        """The supervisor of a new process, with pipes of the process's output and errors."""
        wrapped = [sys.executable, "-I", "-S", str(_SUPERVISOR), str(self._reading)]
        wrapped += [*(str(folder.absolute()) for folder in folders), "--", *command]
        with self._lock:
            if self._is_cut:
                raise WanExportError("stopped, as another process of this command failed")
            return subprocess.Popen(
                wrapped,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                env=environment,
                pass_fds=[self._reading],
                # Ctrl-C is for this process, which ends the others.
                start_new_session=True,
            )


def run_command(
    command: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    lifeline: Lifeline | None = None,
    folders: Sequence[Path] = (),
    timeout: float | None = None,
    on_line: Callable[[str], None] | None = None,
) -> Ended:
    """Run a program to its end, and end whatever it leaves running.

    on_line is given each line of its output, which is then not kept. When this process dies, or the
    lifeline's block ends, the program is killed and the folders are removed: temporary ones.
    Raises FileNotFoundError when there is no such program, and TimeoutError, once it has been
    killed, when it takes over timeout seconds.
    """
    if shutil.which(command[0]) is None:
        raise FileNotFoundError(f"there is no program {command[0]}")
    if lifeline is None:
        with Lifeline() as own:
            return _run(own, command, environment, folders, timeout, on_line)
    return _run(lifeline, command, environment, folders, timeout, on_line)


def _run(
    lifeline: Lifeline,
    command: Sequence[str],
    environment: Mapping[str, str] | None,
    folders: Sequence[Path],
    timeout: float | None,
    on_line: Callable[[str], None] | None,
) -> Ended:
    lines: list[str] = []
    late: list[float] = []
    with lifeline.start(command, environment or os.environ, folders) as child:
        assert child.stdout is not None and child.stderr is not None

        def stop() -> None:
            late.append(timeout or 0)
            child.terminate()  # the supervisor kills the rest

        errors = _Tail(child.stderr)
        timer = Timer(timeout, stop) if timeout is not None else None
        try:
            if timer:
                timer.start()
            for line in child.stdout:
                (on_line or lines.append)(line)
        except BaseException:
            child.terminate()
            raise
        finally:
            child.wait()
            errors.join()  # before its stream is closed
            if timer:
                timer.cancel()
    if late:
        raise TimeoutError(f"{command[0]} took over {late[0]:g} s and was stopped")
    return Ended(child.returncode, "".join(lines), errors.kept)


class _Tail(Thread):
    """Reads a stream to its end, lest its writer wait, and keeps the last of it."""

    def __init__(self, stream: IO[str]) -> None:
        super().__init__(daemon=True)
        self._stream, self.kept = stream, ""
        self.start()

    def run(self) -> None:
        while text := self._stream.read(1 << 16):
            self.kept = (self.kept + text)[-_MOST_ERRORS:]


def environment_of(scratch: Path) -> dict[str, str]:
    """This process's environment, with every temporary file and cache of libraries in a folder.

    What libraries ask of the user's account is filled in where it has no name or home.
    """
    found = dict(os.environ)
    caches = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
    found |= {name: str(scratch / folder) for name, folder in caches.items()}
    found["TMPDIR"] = str(scratch)
    found |= missing_name()
    if not os.path.isdir(os.path.expanduser("~")):
        found["HOME"] = str(scratch)
    return found


def missing_name() -> dict[str, str]:
    """A variable that names the user where nothing does: PyTorch 2.11 asks when it is imported."""
    if any(os.environ.get(name) for name in _NAMES):
        return {}
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:  # as in a container that is run as a number
        return {"USER": f"uid{os.getuid()}"}
    return {}


def last_words(code: int, errors: str) -> str:
    """Why a program failed, in one line, from its exit code and what it wrote to standard error."""
    if code == -signal.SIGKILL:
        return "its process was killed: out of memory?"
    if code < 0:
        return f"its process died of signal {-code}"
    lines = [line for line in errors.splitlines() if line.strip()]
    raised = [line for line in lines if re.match(r"[\w.]+(Error|Exception): ", line)]
    return (raised or lines or [f"exit code {code}"])[-1].strip()
