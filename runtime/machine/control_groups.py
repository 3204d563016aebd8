"""The memory that control groups leave a process, in both of their versions.

See https://docs.kernel.org/admin-guide/cgroup-v2.html and .../cgroup-v1/memory.html.
"""

from functools import cache
from pathlib import Path

_LIMITS = ("memory.max", "memory.limit_in_bytes")  # of version 2, of version 1
_USES = ("memory.current", "memory.usage_in_bytes")
# In version 1, the names without total leave out the groups within.
_CACHES = (("total_inactive_file", "total_active_file"), ("inactive_file", "active_file"))


@cache
def control_groups(process: Path = Path("/proc/self")) -> tuple[Path, ...]:
    """The folders of the groups that a process is in and of those that these lie in.

    process is its folder in /proc. There are none where the system has no control groups.
    """
    try:
        own = _paths((process / "cgroup").read_text(errors="surrogateescape"))
        mounts = (process / "mountinfo").read_text(errors="surrogateescape")
    except OSError:
        return ()
    found: list[Path] = []
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        (root, point), (kind, _, options) = before.split(" ")[3:5], after.split(" ", 2)
        controller = {"cgroup2": "", "cgroup": "memory"}.get(kind)
        if controller not in own or (controller and controller not in options.split(",")):
            continue
        # In a container the path may be the host's, of which the root is mounted, or one outside.
        path = own[controller]
        inside = path.removeprefix(root.rstrip("/")).strip("/") if path.startswith(root) else ""
        folder = Path(point) / ("" if ".." in inside else inside)
        found += [p for p in (folder, *folder.parents) if p.is_relative_to(point) and p.is_dir()]
    return tuple(found)


def memory_limit(group: Path) -> int | None:
    """The bytes that the group may take; None where nothing limits it."""
    return _number(group, _LIMITS)


def memory_used(group: Path) -> int:
    """The bytes that the group takes, without what only caches files: the kernel takes that back
    before it refuses memory."""
    return max(0, (_number(group, _USES) or 0) - _cached(group))


def _paths(lines: str) -> dict[str, str]:
    """Path of the group by controller; the empty name is version 2's, of all controllers."""
    groups = {}
    for line in lines.splitlines():
        _, controllers, path = line.split(":", 2)
        groups.update(dict.fromkeys(controllers.split(","), path))
    return groups


def _number(group: Path, names: tuple[str, ...]) -> int | None:
    for name in names:
        try:
            return int((group / name).read_text())
        except (OSError, ValueError):  # there is no such file, or it says max
            continue
    return None


def _cached(group: Path) -> int:
    try:
        fields = (line.split() for line in (group / "memory.stat").read_text().splitlines())
        figures = {field[0]: int(field[1]) for field in fields if len(field) == 2}
    except (OSError, ValueError):
        return 0
    names = next((names for names in _CACHES if names[0] in figures), ())
    return sum(figures.get(name, 0) for name in names)
