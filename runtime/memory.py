"""How much memory there is, and how much was used."""

import resource
import sys
from functools import cache
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def peak_rss() -> int:
    """Largest resident memory of this process or of any finished child, in bytes.

    `getrusage` says of this process what the one that started it held until then, too; of a child
    it says no more than that of this one.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    own = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) * 1024


def peak_gpu_bytes() -> int:
    """Most GPU memory that this process's tensors took at a time; 0 where it has used no GPU."""
    torch = sys.modules.get("torch")
    return torch.cuda.max_memory_allocated() if torch and torch.cuda.is_initialized() else 0


def free_bytes(device: str) -> int:
    """Memory that can be had on a device: `cpu`, `cuda` for the current GPU, or one as `cuda:1`."""
    if device == "cpu":
        return available_bytes()
    import torch

    free: int = torch.cuda.mem_get_info(device)[0]
    return free


def available_bytes() -> int:
    """Memory that can be had without swapping, in this machine and its control groups."""
    left = [_meminfo()["MemAvailable"]]
    for group in _control_groups():
        limit, used = _number(group / "memory.max"), _number(group / "memory.current")
        if limit is not None and used is not None:
            left.append(limit - used)
    return max(0, min(left))


def limit_bytes() -> int:
    """The most this process could ever have: memory and swap, or what a control group may use."""
    info = _meminfo()
    limits = [_number(group / "memory.max") for group in _control_groups()]
    return min([info["MemTotal"] + info["SwapTotal"], *(n for n in limits if n is not None)])


@cache
def _control_groups() -> tuple[Path, ...]:
    """The folders of this process's control group (version 2) and of those it lies in."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    own = next((line[3:].lstrip("/") for line in lines if line.startswith("0::")), "")
    path = _CGROUPS / own
    return tuple(p for p in (path, *path.parents) if p.is_relative_to(_CGROUPS) and p.is_dir())


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # there is no such file, or it says max
        return None


def _meminfo() -> dict[str, int]:
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    return {fields[0].rstrip(":"): int(fields[1]) * 1024 for fields in lines}
