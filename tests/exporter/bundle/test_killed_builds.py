"""A build killed when its weights are finished: the bundle is as before, and the rerun resumes.

`test_disk_faults` kills a build that compiles nothing before each operation, in milliseconds.
`python -m tests.tables.killed_builds` kills many at random instants.
"""

import time
from pathlib import Path

import pytest

from tests.tables.killed_builds import NEW, OLD, check_rerun, kill, start, state


def kill_in_proof(bundle: Path, shape: tuple[str, int], *, group: bool) -> None:
    child = start(bundle, shape)
    folder = bundle / "engines" / f"{shape[0]}x{shape[1]}"
    while not any(folder.rglob("denoiser.onnx")):  # written, and its proof begins
        assert child.poll() is None
        time.sleep(0.05)
    kill(child, group=group)
    assert child.returncode == -9


@pytest.mark.slow
def test_a_killed_build_changes_nothing_and_the_rerun_resumes(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    kill_in_proof(bundle, OLD, group=True)
    assert state(bundle, had_old=False) == "none"
    assert check_rerun(bundle, OLD)
    kill_in_proof(bundle, NEW, group=False)
    assert state(bundle, had_old=True) == "old"
