"""Damage bundles, kill builds and fill disks, many times, and count what broke a promise.

    python -m tests.tables.campaign [MUTANTS] [KILLS] [BUILDS]        10000, 50 and 10 by default

MUTANTS manifests, journals and checkpoints each are damaged; KILLS parents are killed while their
children start; BUILDS builds of either CPU backend are killed at random instants. The rest covers
every case once: a kill at each file operation, a full disk at each name and byte, links, pipes and
folders in every place, hostile archives. Exits with 1 when anything failed.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

from tests.exporter.child.killed_parents import kill_after
from tests.graphs.checkpoint_fuzz import failures as checkpoint_failures
from tests.runtime.bundle.mutations import failures as manifest_failures
from tests.runtime.bundle.mutations import mutant, read_inspect_choose
from tests.runtime.bundle.small_bundle import small_bundle
from tests.tables.killed_builds import main as kill_builds
from wanexport.exporter.bundle.place import JOURNAL
from wanexport.exporter.bundle.writer import open_bundle
from wanexport.runtime.bundle.manifest import read_manifest
from wanexport.runtime.errors import WanExportError
from wanexport.runtime.machine.memory import peak_rss

ROOT = Path(__file__).parents[2]
ONCE = (  # tests that cover every case of a kind
    "exporter/bundle/test_disk_faults.py",
    "exporter/bundle/test_bundle_place.py",
    "exporter/bundle/test_bundle_lock.py",
    "exporter/bundle/test_sweep.py",
    "exporter/child/test_process.py",
    "exporter/lint/test_program_lint.py",
    "runtime/bundle/test_tensorfile.py",
)


def manifests(count: int) -> list[str]:
    """Damaged manifests, read, inspected and chosen from."""
    with tempfile.TemporaryDirectory() as name:
        bundle = small_bundle(Path(name) / "bundle", "onnx", "aoti", "tensorrt")
        with open(os.devnull, "w") as nobody, redirect_stdout(nobody):
            read_inspect_choose(bundle)  # what is imported at first takes its time once
            return manifest_failures(bundle, range(count), read_inspect_choose)


def journals(count: int) -> list[str]:
    """Damaged journals: a build goes on beside each, or refuses in one line."""
    found = []
    with tempfile.TemporaryDirectory() as name:
        bundle = small_bundle(Path(name) / "bundle", "onnx")
        whole, manifest = (bundle / "manifest.json").read_text(), read_manifest(bundle)
        for seed in range(count):
            (bundle / JOURNAL).write_text(mutant(json.loads(whole), seed))
            try:
                with open_bundle(bundle, manifest):
                    pass
            except WanExportError as error:
                if not str(error).isprintable():
                    found.append(f"{seed}: {error!r:.300}")
            except Exception as error:
                found.append(f"{seed}: {type(error).__name__}: {error!r:.300}")
    return found


def parents(count: int) -> list[str]:
    """Parents killed while their children start: what outlived them, or wrote on."""
    rng, found = random.Random(0), []
    with tempfile.TemporaryDirectory() as name:
        for number in range(count):
            left, wrote = kill_after(rng.uniform(0, 0.5), Path(name) / str(number))
            if left or wrote:
                found.append(f"{number}: processes {left}, wrote on: {wrote}")
    return found


def once(count: int) -> list[str]:
    """Every case of the tests named above; count is not used."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [str(ROOT / "tests" / name) for name in ONCE]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(ended.stdout.splitlines()[-1])
    return [line for line in ended.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]


def builds(count: int, backend: str) -> list[str]:
    """Builds killed at random instants, each run again; an assertion says what was not kept."""
    try:
        kill_builds(count, 0, backend)
    except AssertionError as error:
        return [str(error)]
    return []


def main(mutants: int = 10_000, kills: int = 50, number: int = 10) -> int:
    """Print a line for each part of the campaign; return how many failures there were."""
    parts: tuple[tuple[str, int, Callable[[int], list[str]]], ...] = (
        ("damaged manifests", mutants, manifests),
        ("damaged journals", mutants // 10, journals),
        ("damaged checkpoints", mutants, lambda count: checkpoint_failures(count, 1)),
        ("parents killed while their children start", kills, parents),
        ("ONNX builds killed", number, lambda count: builds(count, "onnx")),
        ("AOTInductor builds killed", number, lambda count: builds(count, "aoti")),
        ("every case of the tests", 1, once),
    )
    warnings.simplefilter("ignore")
    total = 0
    for what, count, run in parts:
        started = time.monotonic()
        failed = run(count) if count else []
        total += len(failed)
        seconds, peak = time.monotonic() - started, peak_rss() / 1e6
        print(f"{what}: {count}, failed {len(failed)}, {seconds:.0f} s, peak {peak:.0f} MB")
        print("".join(f"    {line}\n" for line in failed[:20]), end="", flush=True)
    return total


if __name__ == "__main__":
    sys.exit(bool(main(*map(int, sys.argv[1:]))))
