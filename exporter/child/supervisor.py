"""Run a command so that nothing of it outlives the process that asked for it.

    python -I -S supervisor.py LIFELINE [FOLDER...] -- COMMAND...

The command and what it starts are a session of their own. All of it is killed when the command
ends, when this process is told to stop by a signal, and when the process that holds the writing end
of the pipe LIFELINE is dead: then the folders go too. The exit status is the command's.

It is run by its path and imports next to nothing: it stands between the two before the command
has imported anything, and starts in some 20 ms. `wanexport.exporter.child.process` is its caller.
"""

import ctypes
import os
import select
import signal
import sys
from collections.abc import Iterator

_PARENT_DEATH_SIGNAL, _DUMPABLE, _CHILD_SUBREAPER = 1, 4, 36  # of Linux's prctl
_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)
_NOT_STARTED = 127  # as a shell says it
_prctl = ctypes.CDLL(None).prctl


def main(lifeline: int, folders: list[str], command: list[str]) -> int:
    """Run the command to its end or its caller's, and return the wait status of it."""
    _prctl(_CHILD_SUBREAPER, 1)  # what leaves the session is handed to this process, not to init
    os.set_inheritable(lifeline, False)
    waked = _wake_by_signals()
    status = signal.SIGKILL.value
    if not _ready(lifeline):
        own = os.getpid()
        child = os.fork()
        if child == 0:
            _become(command, own)
        _wait(child, lifeline, waked)
        status = _end(child)
    if _ready(lifeline):
        import shutil

        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
    return status


def _wake_by_signals() -> int:
    """A pipe's reading end: a byte comes for every signal, and its value is the signal's number."""
    waked, waking = os.pipe()
    os.set_blocking(waking, False)
    signal.set_wakeup_fd(waking)
    for number in (*_STOPS, signal.SIGCHLD):
        signal.signal(number, lambda number, frame: None)
    return waked


def _ready(*descriptors: int, wait: bool = False) -> list[int]:
    """Those of which a read would not wait: of the lifeline, that nobody holds its other end."""
    poll = select.poll()  # `select.select` takes no descriptor over 1023
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return [descriptor for descriptor, _ in poll.poll(None if wait else 0)]


def _become(command: list[str], supervisor: int) -> None:
    """The new process: a session of its own, which dies with this one, and then the command."""
    try:
        os.setsid()
        _prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != supervisor:  # it died before the signal was asked for
            os._exit(_NOT_STARTED)
        for number in _IGNORED_BY_PYTHON:
            signal.signal(number, signal.SIG_DFL)
        os.execvp(command[0], command)
    except OSError as error:
        os.write(2, f"{command[0]}: {error.strerror}\n".encode())
    finally:
        os._exit(_NOT_STARTED)


def _wait(child: int, lifeline: int, waked: int) -> None:
    """Return when the command has ended, its caller is dead, or a signal says to stop."""
    stops = bytes(_STOPS)
    while True:
        ready = _ready(lifeline, waked, wait=True)
        if lifeline in ready or any(number in stops for number in os.read(waked, 64)):
            return
        # Left unreaped, it keeps the number of its group from being given to another.
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return


def _end(child: int) -> int:
    """Kill the session and whatever else descends from it; return the command's wait status."""
    status = 0
    try:
        os.killpg(child, signal.SIGKILL)
    except OSError:  # it has no session yet
        os.kill(child, signal.SIGKILL)
    while True:
        for pid in _children():
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:  # it belongs to another user by now
                pass
        try:
            pid, ended = os.waitpid(-1, 0)
        except ChildProcessError:
            return status
        status = ended if pid == child else status


def _children() -> Iterator[int]:
    own = str(os.getpid())
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                parent = file.read().rpartition(b")")[2].split()[1]
        except OSError:  # it is gone
            continue
        if parent.decode() == own:
            yield int(name)


def _exit_like(status: int) -> None:
    """End this process as the command ended."""
    if os.WIFSIGNALED(status):
        _prctl(_DUMPABLE, 0)  # one core is enough
        number = os.WTERMSIG(status)
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.WEXITSTATUS(status))


if __name__ == "__main__":
    separator = sys.argv.index("--")
    lifeline, *folders = sys.argv[1:separator]
    _exit_like(main(int(lifeline), folders, sys.argv[separator + 1 :]))
