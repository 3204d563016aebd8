"""How much memory there is, and how much was used."""

import resource
from functools import cache
from pathlib import Path

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def peak_rss() -> int:
    """Largest resident memory of this process or of any finished child, in bytes."""
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(w).ru_maxrss for w in who) * 1024


def available_bytes() -> int:
    """Memory that can be had without swapping."""
    return min(_meminfo()["MemAvailable"], limit_bytes())


@cache
def limit_bytes() -> int:
    """The most this process could ever have: memory and swap, or what its control group may use."""
    info = _meminfo()
    limits = [info["MemTotal"] + info["SwapTotal"]]
    for name in _CGROUP_LIMITS:
        path = Path(name)
        if path.is_file() and (text := path.read_text().strip()).isdigit():
            limits.append(int(text))
    return min(limits)


def _meminfo() -> dict[str, int]:
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    return {fields[0].rstrip(":"): int(fields[1]) * 1024 for fields in lines}
