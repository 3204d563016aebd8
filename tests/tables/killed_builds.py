"""Kill builds of `tiny` at random instants; every load must see an old bundle, a new one, or none.

    python -m tests.tables.killed_builds [NUMBER] [SEED] [BACKEND]        50, 0 and onnx by default

Half of the builds start a bundle and half add a second shape to one. After each kill the bundle is
opened, the same command is run again, and what it leaves is verified and counted.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from wanexport.exporter.inspection import inspect
from wanexport.runtime import load
from wanexport.runtime.bundle.manifest import read_manifest
from wanexport.runtime.errors import WanExportError

OLD, NEW = ("32x48", 5), ("32x32", 1)
_KEPT = {"manifest.json", ".lock"}


def command(bundle: Path, shape: tuple[str, int], backend: str = "onnx") -> list[str]:
    build = [sys.executable, "-m", "wanexport.exporter.cli.main", "build", "-m", "tiny"]
    engine = ["--resolution", shape[0], "--frames", str(shape[1]), "--backend", backend]
    return [*build, "--random-weights", "0", *engine, "-o", str(bundle)]


def start(bundle: Path, shape: tuple[str, int], backend: str = "onnx") -> subprocess.Popen[bytes]:
    """Start a build in a process group of its own."""
    return subprocess.Popen(
        command(bundle, shape, backend),
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def kill(child: subprocess.Popen[bytes], *, group: bool) -> None:
    """Kill a build, alone or with its children, and wait for it."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL) if group else child.kill()
    child.communicate()


def state(bundle: Path, *, had_old: bool) -> str:
    """What a load sees: `none`, `old` or `new`. Raises AssertionError for anything else."""
    try:
        held = [engine.name for engine in read_manifest(bundle).engines]
    except WanExportError as error:
        assert "is no bundle" in str(error), error
        assert not had_old
        return "none"
    if had_old:
        load(bundle, resolution=OLD[0], frames=OLD[1])
    is_new = any(name.startswith(f"{NEW[0]}x{NEW[1]}/") for name in held)
    if is_new:
        load(bundle, resolution=NEW[0], frames=NEW[1])
    assert is_new or had_old
    return "new" if is_new else "old"


def check_rerun(bundle: Path, shape: tuple[str, int], backend: str = "onnx") -> bool:
    """Run the build again: whole, verified, nothing left over. Return whether it resumed."""
    child = subprocess.run(command(bundle, shape, backend), capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    load(bundle, resolution=shape[0], frames=shape[1])
    assert inspect(bundle, verify=True)["problems"] == []
    files = {p.relative_to(bundle).as_posix() for p in bundle.rglob("*") if p.is_file()}
    assert files - _KEPT == {file.path for file in read_manifest(bundle).files()}, files
    return "reused" in child.stdout


def main(number: int, seed: int, backend: str = "onnx") -> None:
    """Print how many kills left what."""
    rng = random.Random(seed)
    seen: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        old = Path(name) / "old"
        started = time.monotonic()
        subprocess.run(command(old, OLD, backend), check=True, capture_output=True)
        span = time.monotonic() - started
        for i in range(number):
            bundle = Path(name) / "bundle"
            if i % 2:
                shutil.copytree(old, bundle)
            child = start(bundle, NEW, backend)
            time.sleep(rng.uniform(0, 1.05 * span))
            kill(child, group=i % 4 < 2)
            kind = "finished" if child.returncode == 0 else "killed"
            found = state(bundle, had_old=bool(i % 2))
            rerun = "resumed" if check_rerun(bundle, NEW, backend) else "rebuilt"
            seen[f"{kind}, {found}, rerun {rerun}"] += 1
            shutil.rmtree(bundle)
            print(f"\r{i + 1} of {number}", end="", file=sys.stderr, flush=True)
    for what, count in sorted(seen.items()):
        print(f"{count:3} {what}")


if __name__ == "__main__":
    number, seed, backend = (*sys.argv[1:], *("50", "0", "onnx")[len(sys.argv) - 1 :])
    main(int(number), int(seed), backend)
