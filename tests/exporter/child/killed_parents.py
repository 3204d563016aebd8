"""Kill a parent of children at random instants of their start; nothing of them may stay or write.

    python -m tests.exporter.child.killed_parents [NUMBER] [SEED]        NUMBER defaults to 50

Half are stand-ins: each child is slow to import, and starts a process in a session of its own that
ignores signals; all of them write into their folder as long as they live. Half are builds.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BUILDS = (("onnx", "proof_process"), ("aoti", "compile"))  # backend, and a child of its builds
GRACE = 0.5  # seconds in which all must be gone
# What a child of a build does, and its compilers: argv is the file that each goes on writing.
STUB = """
import os, signal, subprocess, sys, time
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
path = sys.argv[1]
if not path.endswith("x"):
    subprocess.Popen([sys.executable, "-S", "-c", sys.argv[2], path + "x", sys.argv[2]],
                     start_new_session=True)
while True:
    open(path, "a").write("x")
    time.sleep(0.01)
"""
PARENT = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from wanexport.exporter.child.process import run_command
folder, stub, number = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
def run(name):
    command = [sys.executable, "-S", "-c", stub, str(folder / name), stub]
    run_command(command, folders=[folder / "t"])
print("ready", flush=True)
with ThreadPoolExecutor(number) as pool:
    list(pool.map(run, map(str, range(number))))
"""


def kill_after(seconds: float, folder: Path, children: int = 3) -> tuple[list[int], bool]:
    """Start a parent, kill it, and return the processes that are left and whether any wrote on."""
    (folder / "t").mkdir(parents=True)
    command = [sys.executable, "-c", PARENT, str(folder), STUB, str(children)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        time.sleep(seconds)
        parent.kill()
    time.sleep(GRACE)
    left = alive(str(folder))
    before = sizes(folder)
    time.sleep(0.05)
    wrote = sizes(folder) != before
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    began = len(before) > 1  # a parent that had started nothing yet leaves its empty folder
    return left, wrote or (began and (folder / "t").exists())


def kill_build(backend: str, child: str, seconds: float, folder: Path) -> tuple[list[int], bool]:
    """Start a build and kill it so long after a child of it appears.

    Returns the processes that are left, and whether anything was written or kept after that: of
    temporary files, or in the bundle.
    """
    temporary, bundle = folder / "temporary", folder / "bundle"
    temporary.mkdir(parents=True)
    size = ["--resolution", "32x32", "--frames", "1", "--device", "cpu", "--backend", backend]
    command = [sys.executable, "-m", "wanexport.exporter.cli.main", "build", "-m", "tiny"]
    command += ["--random-weights", "0", *size, "-o", str(bundle)]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    word = f"wanexport.exporter.backends.{backend}.{child}\0{temporary}"
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as build:
        while not alive(word) and build.poll() is None:
            time.sleep(0.005)
        time.sleep(seconds)
        build.kill()
    assert build.returncode == -signal.SIGKILL, "it ended before its child began"
    time.sleep(GRACE)
    left, before = alive(str(temporary)), states(folder)
    time.sleep(1)
    return left, states(folder) != before or any(temporary.iterdir())


def states(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder, with its size and the time of its last change."""
    files = {str(path): path.stat() for path in folder.rglob("*")}
    return {path: (status.st_size, status.st_mtime_ns) for path, status in files.items()}


def sizes(folder: Path) -> dict[str, int]:
    """What lies in a folder, and how large it is."""
    return {path.name: path.stat().st_size for path in folder.iterdir()}


def alive(word: str) -> list[int]:
    """Processes whose command line has the word, but for this one."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_text(errors="replace")
        except OSError:  # it is gone
            continue
        if word in line and int(path.parent.name) != os.getpid():
            found.append(int(path.parent.name))
    return found


def main(number: int, seed: int) -> None:
    """Print how many parents were killed, and how many left something."""
    rng = random.Random(seed)
    bad = 0
    with tempfile.TemporaryDirectory() as name:
        for i in range(number):
            folder, seconds = Path(name) / str(i), rng.uniform(0, 0.5)
            left, wrote = (
                kill_build(*BUILDS[i // 2 % len(BUILDS)], seconds, folder)
                if i % 2
                else kill_after(seconds, folder)
            )
            bad += bool(left) or wrote
    print(f"{number} parents killed, {bad} left something")


if __name__ == "__main__":
    arguments = [int(argument) for argument in sys.argv[1:]]
    main(*(arguments + [50, 0][len(arguments) :]))
