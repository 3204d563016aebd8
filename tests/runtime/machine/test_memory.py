"""Memory figures are in bytes and in order, and every control group's limit counts."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from wanexport.runtime.machine import memory
from wanexport.runtime.machine.control_groups import control_groups

Make = Callable[..., Path]
LIMITS = {1: "memory.limit_in_bytes", 2: "memory.max"}
USES = {1: "memory.usage_in_bytes", 2: "memory.current"}
MIB = 1 << 20


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Has this process be in a group of a version; gives the folder that the groups lie in."""

    def made(
        version: int, path: str = "/slice/job", root: str = "/", inside: str = "slice/job"
    ) -> Path:
        process, mounted = tmp_path / "self", tmp_path / "groups"
        for folder in (process, mounted / inside):
            folder.mkdir(parents=True)
        kind, options = {1: ("cgroup", "rw,memory"), 2: ("cgroup2", "rw")}[version]
        name = "4:cpu,memory" if version == 1 else "0:"
        (process / "cgroup").write_text(f"9:name=systemd:/x\n{name}:{path}\n")
        (process / "mountinfo").write_text(
            "23 1 0:2 / / rw,relatime - ext4 /dev/vda rw\n"
            "24 1 0:3 / /empty rw - tmpfs  rw\n"  # a mount whose source is an empty text
            f"32 31 0:29 / {tmp_path}/cpu rw - cgroup cgroup rw,cpu\n"
            f"35 31 0:32 {root} {mounted} rw shared:9 - {kind} cgroup {options}\n"
        )
        found = control_groups(process)
        monkeypatch.setattr(memory, "control_groups", lambda: found)
        return mounted

    return made


def limit(group: Path, version: int, size: int | str, used: int, **stat: int) -> None:
    (group / LIMITS[version]).write_text(f"{size}\n")
    (group / USES[version]).write_text(f"{used}\n")
    (group / "memory.stat").write_text("".join(f"{name} {n}\n" for name, n in stat.items()))


def test_figures_are_in_bytes_and_in_order() -> None:
    block = np.ones(1 << 24)  # 128 MiB, touched
    assert block.nbytes < memory.peak_rss() < memory.limit_bytes()
    assert 0 < memory.available_bytes() <= memory.limit_bytes()


@pytest.mark.parametrize("version", [1, 2])
def test_a_control_group_without_a_limit_changes_nothing(version: int, make: Make) -> None:
    own = memory.limit_bytes()
    none = {1: str(0x7FFFFFFFFFFFF000), 2: "max"}[version]
    limit(make(version) / "slice" / "job", version, none, MIB)
    assert memory.limit_bytes() >= own
    assert memory.available_bytes() > 8 * MIB


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("folder", ["", "slice", "slice/job"])
def test_the_limit_of_any_control_group_counts_with_its_use(
    folder: str, version: int, make: Make
) -> None:
    limit(make(version) / folder, version, 8 * MIB, MIB)
    assert memory.limit_bytes() == 8 * MIB
    assert memory.available_bytes() == 7 * MIB


@pytest.mark.parametrize(
    ("version", "prefix"), [(1, "total_"), (2, "")], ids=["version 1", "version 2"]
)
def test_what_caches_files_is_free(version: int, prefix: str, make: Make) -> None:
    """A 32 MiB limit of which 3 are used, and 28 hold weights that were read."""
    own = {"inactive_file": 0, "active_file": MIB} if version == 1 else {}
    files = {f"{prefix}inactive_file": 20 * MIB, f"{prefix}active_file": 8 * MIB}
    group = make(version) / "slice" / "job"
    limit(group, version, 32 * MIB, 31 * MIB, anon=3 * MIB, **own, **files)
    assert memory.available_bytes() == 29 * MIB
    assert memory.limit_bytes() == 32 * MIB


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("path", "root", "inside"),
    [
        ("/docker/abc", "/docker/abc", ""),  # a container that is told the host's path
        ("/docker/abc/job", "/docker/abc", "job"),
        ("/", "/", ""),  # one with a name space of its own
        ("/../../job", "/", ""),  # a group outside of it
        ("/elsewhere", "/docker/abc", ""),
    ],
)
def test_a_container_sees_its_own_group(
    path: str, root: str, inside: str, version: int, make: Make
) -> None:
    limit(make(version, path, root, inside) / inside, version, 8 * MIB, MIB)
    assert memory.available_bytes() == 7 * MIB


def test_this_process_has_control_groups_or_none() -> None:
    assert all(folder.is_dir() for folder in control_groups())


def test_a_system_without_control_groups_has_none(tmp_path: Path) -> None:
    assert control_groups(tmp_path) == ()


def test_what_a_parent_held_is_not_counted_of_a_child() -> None:
    """As `getrusage` does: a child begins with the peak of the process that starts it."""
    block = np.ones(1 << 25)  # 256 MiB, touched
    code = "from wanexport.runtime.machine.memory import peak_rss; print(peak_rss())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < int(child.stdout) < block.nbytes / 2


def test_what_a_finished_child_held_is_counted_of_its_parent() -> None:
    code = (
        "import subprocess, sys; from wanexport.runtime.machine.memory import peak_rss; "
        "subprocess.run([sys.executable, '-c', 'bytearray(b\"x\" * (1 << 28))']); print(peak_rss())"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(child.stdout) > 1 << 28
