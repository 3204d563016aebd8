"""Makes of this process what Windows would be to Python code: without what it lacks, and stricter.

A stand-in: paths and libraries stay Linux's. For children of tests, before they import wanexport.
"""

import builtins
import ctypes
import errno
import io
import os
import shutil
import sys
from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace
from typing import Any

GIB = 1 << 30
TOTAL, AVAILABLE, SWAP = 16 * GIB, 5 * GIB, 4 * GIB  # bytes of this machine's memory
MODULES = ("fcntl", "grp", "pwd", "resource", "syslog", "termios", "tty", "pty")
NAMES = (  # of `os`, that Python has on Linux and not on Windows
    "O_CLOEXEC O_DIRECTORY O_NOCTTY O_NOFOLLOW O_NONBLOCK O_PATH O_SYNC O_TMPFILE ST_NOEXEC "
    "WEXITSTATUS chown chroot confstr copy_file_range fchdir fchmod fchown fork forkpty fpathconf "
    "fstatvfs getegid geteuid getgid getgroups getloadavg getpgid getpgrp getpriority getsid "
    "getuid killpg lchown lockf major memfd_create mkfifo mknod nice openpty pathconf "
    "posix_fadvise posix_fallocate posix_spawn pread preadv pwrite pwritev readv register_at_fork "
    "sched_getaffinity sched_yield sendfile setpriority setsid setuid statvfs sync sysconf "
    "tcgetpgrp uname wait wait4 waitid writev"
).split()


def become_windows(*libraries: str) -> None:
    """Take away modules, names of `os` and /proc; rename no open file, and tell of the memory.

    libraries of others are imported before, since they see that this is Linux.
    """
    for library in libraries:
        import_module(library)
    real_replace, real_readlink, real_listdir = os.replace, os.readlink, os.listdir
    for module in MODULES:
        sys.modules[module] = None  # type: ignore[assignment]
    for name in NAMES:
        if hasattr(os, name):
            delattr(os, name)
    for functions in (os.supports_dir_fd, os.supports_fd, os.supports_follow_symlinks):
        functions.clear()
    for owner, names in (
        (builtins, ("open",)),
        (io, ("open",)),
        (os, ("open", "stat", "lstat", "readlink", "listdir", "scandir")),
    ):
        for name in names:
            setattr(owner, name, _without_proc(getattr(owner, name)))

    def replace(source: Any, target: Any) -> None:
        for descriptor in real_listdir("/proc/self/fd"):
            try:
                held = real_readlink(f"/proc/self/fd/{descriptor}")
            except OSError:  # of the listing itself
                continue
            if held == os.path.abspath(os.fspath(source)):
                raise PermissionError(errno.EACCES, "it is used by another process", source)
        real_replace(source, target)

    os.replace = replace  # type: ignore[assignment]
    shutil.disk_usage = lambda path: SimpleNamespace(free=100 * GIB)  # type: ignore[assignment, return-value]
    ctypes.windll = SimpleNamespace(kernel32=Kernel32())  # type: ignore[attr-defined]


def _without_proc(function: Callable[..., Any]) -> Callable[..., Any]:
    def strict(path: Any, *arguments: Any, **options: Any) -> Any:
        if not isinstance(path, int) and os.fsdecode(path).startswith(("/proc", "/sys", "/dev")):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)
        return function(path, *arguments, **options)

    return strict


class Kernel32:
    """Answers as the documentation of GlobalMemoryStatusEx says: 64 bytes, the first their size."""

    def __init__(self, answers: int = 1) -> None:
        self.answers = answers

    def GlobalMemoryStatusEx(self, reference: Any) -> int:
        """Fill a MEMORYSTATUSEX: two DWORDs, then seven DWORDLONGs."""
        memory = (ctypes.c_uint64 * 8).from_buffer(reference._obj)
        assert memory[0] == ctypes.sizeof(reference._obj) == 64  # little-endian; a load of 0
        memory[1:6] = [TOTAL, AVAILABLE, TOTAL + SWAP, 9 * GIB, 1 << 47]
        return self.answers
