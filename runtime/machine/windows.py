"""What Windows says of the machine's memory.

See learn.microsoft.com/windows/win32/api/sysinfoapi/ns-sysinfoapi-memorystatusex.
"""

import ctypes
from typing import Any


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX."""

    _fields_ = (
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        ("total", ctypes.c_uint64),
        ("available", ctypes.c_uint64),
        ("total_page_file", ctypes.c_uint64),  # memory and swap together
        ("available_page_file", ctypes.c_uint64),
        ("total_virtual", ctypes.c_uint64),
        ("available_virtual", ctypes.c_uint64),
        ("available_extended_virtual", ctypes.c_uint64),
    )


def windows_memory(kernel32: Any) -> dict[str, int]:
    """Bytes by Linux's names: MemTotal, MemAvailable and SwapTotal; kernel32 is the library.

    Raises OSError when it does not say.
    """
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    if not kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        raise OSError("GlobalMemoryStatusEx failed")
    return {
        "MemTotal": status.total,
        "MemAvailable": status.available,
        "SwapTotal": max(0, status.total_page_file - status.total),
    }
