"""Levels of instruction sets: what machine code is compiled for, and whether this processor has it.

A level is a name that compilers take with -march. Code for a level runs on every processor that has
it, whoever made the processor; code for the build's own (`native`) would not.
"""

import platform
from functools import cache
from pathlib import Path

_X86 = {  # level -> the flags of /proc/cpuinfo that it adds to the one before; the x86-64 psABI
    "x86-64": "cmov cx8 fpu fxsr mmx syscall sse sse2",
    "x86-64-v2": "cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3",
    "x86-64-v3": "avx avx2 bmi1 bmi2 f16c fma abm movbe xsave",
    "x86-64-v4": "avx512f avx512bw avx512cd avx512dq avx512vl",
}
_ARM = {"armv8-a": "fp asimd"}
LEVELS = {"x86_64": _X86, "aarch64": _ARM}  # machine -> its levels, the least first
_WRAPPERS = "x86-64-v3"  # of the host's code of GPU engines: every processor since 2013 or so


def level_of(flags: str, machine: str) -> str:
    """The highest level of a processor with these flags, the least level of its kind at the least.

    Empty for a kind of processor whose levels have no names here.
    """
    levels = LEVELS.get(machine, {})
    found, has = next(iter(levels), ""), set(flags.split())
    for level, needed in levels.items():
        if not has.issuperset(needed.split()):
            break
        found = level
    return found


@cache
def level_here() -> str:
    """The highest level of this machine's processor, as `level_of`, as far as Linux tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:  # on another system
        lines = []
    named = (line.partition(":") for line in lines)
    flags = [value for name, _, value in named if name.strip() in ("flags", "Features")]
    return level_of(flags[0] if flags else "", platform.machine())


def level_for(device: str) -> str:
    """What code for a device is compiled for here: all of this processor, beside a GPU the usual.

    Empty where levels have no names: nothing is compiled there.
    """
    here, levels = level_here(), list(LEVELS.get(platform.machine(), ()))
    if device == "cpu" or _WRAPPERS not in levels or here not in levels:
        return here
    return min(here, _WRAPPERS, key=levels.index)


def runs_here(level: str) -> bool:
    """Whether this machine's processor has all instructions of a level."""
    levels = list(LEVELS.get(platform.machine(), ()))
    if level not in levels or not level_here():
        return level == level_here()
    return levels.index(level) <= levels.index(level_here())
