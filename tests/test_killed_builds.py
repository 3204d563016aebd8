"""A build killed when its weights are finished: the bundle is as before, and the rerun resumes.

`python -m tests.killed_builds` kills many at random instants.
"""

import subprocess
import time
from pathlib import Path

import pytest

from tests.killed_builds import NEW, OLD, check_rerun, command, kill, start, state


@pytest.mark.parametrize(("had_old", "group"), [(False, True), (True, False)])
def test_a_killed_build_changes_nothing_and_resumes(
    had_old: bool, group: bool, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    if had_old:
        subprocess.run(command(bundle, *OLD), check=True, capture_output=True)
    child = start(bundle)
    folder = bundle / "engines" / f"{NEW[0]}x{NEW[1]}"
    while not any(folder.rglob("proof-*")):  # the engine is written, its proof has begun
        assert child.poll() is None
        time.sleep(0.05)
    kill(child, group=group)
    assert child.returncode == -9
    assert state(bundle, had_old=had_old) == ("old" if had_old else "none")
    assert check_rerun(bundle)
