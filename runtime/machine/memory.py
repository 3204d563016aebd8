"""How much memory there is, and how much was used."""

import ctypes
import os
import sys
from pathlib import Path

from wanexport.runtime.machine.control_groups import control_groups, memory_limit, memory_used
from wanexport.runtime.machine.windows import windows_memory


def peak_rss() -> int:
    """Largest resident memory of this process or of any finished child, in bytes; 0 on Windows.

    `getrusage` says of this process what the one that started it held until then, too; of a child
    it says no more than that of this one.
    """
    try:
        import resource
    except ImportError:
        return 0
    lines = Path("/proc/self/status").read_text().splitlines()
    own = next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)
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
    """Memory that can be had without swapping, in this machine and its control groups.

    What only caches files counts as free, in both.
    """
    left = [_meminfo()["MemAvailable"]]
    for group in control_groups():
        limit = memory_limit(group)
        if limit is not None:
            left.append(limit - memory_used(group))
    return max(0, min(left))


def limit_bytes() -> int:
    """The most this process could ever have: memory and swap, or the memory of a control group."""
    return _limited(_meminfo()["MemTotal"] + _meminfo()["SwapTotal"])


def physical_bytes() -> int:
    """Memory of a machine with nothing else in it, without swap: the same at all times."""
    return _limited(_meminfo()["MemTotal"])


def _limited(size: int) -> int:
    limits = [memory_limit(group) for group in control_groups()]
    return min([size, *(n for n in limits if n is not None)])


def _meminfo() -> dict[str, int]:
    """Bytes by the names that Linux has for them: MemTotal, MemAvailable and SwapTotal."""
    try:
        lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    except OSError:
        return _meminfo_elsewhere()
    return {fields[0].rstrip(":"): int(fields[1]) * 1024 for fields in lines}


def _meminfo_elsewhere() -> dict[str, int]:
    """The same on Windows; on other systems all counts as available, and none as swap."""
    windows = getattr(ctypes, "windll", None)
    if windows is not None:
        return windows_memory(windows.kernel32)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {"MemTotal": total, "MemAvailable": total, "SwapTotal": 0}
