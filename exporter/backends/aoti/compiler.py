"""The C++ compiler that makes an engine's code, and the processor it is told to make it for."""

import os
from functools import cache
from typing import Any

from wanexport.exporter.child.process import run_command
from wanexport.runtime.errors import WanExportError

_TIMEOUT = 60  # seconds for it to say its version
_FEATURES = {  # of torch.cpu, by the least level that has them; what has none is in no level
    "_is_avx2_supported": "x86-64-v3",
    "_is_avx512_supported": "x86-64-v4",
    "_is_avx512_bf16_supported": None,
    "_is_vnni_supported": None,
    "_is_amx_tile_supported": None,
}


def compiler() -> str:
    """The compiler: CXX, which Inductor takes as one word too, or g++."""
    return os.environ.get("CXX", "g++")


def compiler_version() -> str:
    """What the compiler calls itself. Raises WanExportError when none works."""
    return _version(compiler())


@cache
def _version(command: str) -> str:
    try:
        ended = run_command([command, "--version"], timeout=_TIMEOUT)
    except OSError:  # there is none, or it does not answer
        ended = None
    if ended is None or ended.code or not ended.output.strip():
        stated = f" (CXX is {command})" if "CXX" in os.environ else ""
        raise WanExportError(
            f"no C++ compiler works{stated}, a build with AOTInductor needs one: install g++, or "
            f"set CXX to one"
        )
    return ended.output.splitlines()[0].strip()


def inductor_settings() -> dict[str, str]:
    """What the environment sets of Inductor, but for where it keeps its files."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith("TORCHINDUCTOR_") and not name.endswith(("_DIR", "VEC_ISA_OK"))
    }


def march_flags(level: str) -> list[str]:
    """How a compiler is told the level; nothing for one that has no name."""
    return [f"-march={level}"] if level else []


def restrict_inductor(level: str) -> None:
    """Have Inductor, in this process, compile for a level of instructions and nothing beyond it.

    Its own choice is this very processor. Raises RuntimeError when this version of it is not told
    so in the way that is known.
    """
    if not level:
        return
    import torch
    from torch._inductor import cpp_builder, cpu_vec_isa

    for name, least in _FEATURES.items():
        if least is None or level < least:  # the names of x86's levels sort as they rise
            setattr(torch.cpu, name, lambda: False)
    if level.startswith("arm"):
        setattr(cpu_vec_isa, "valid_vec_isa_list", lambda: [cpu_vec_isa.VecNEON()])  # noqa: B010
    flags_of = cpp_builder._get_optimization_cflags

    def for_level(*arguments: Any, **options: Any) -> tuple[list[str], list[str]]:
        compiling, linking = flags_of(*arguments, **options)
        kept = [flag for flag in compiling if not flag.startswith(("march=", "mcpu="))]
        if len(kept) != len(compiling) - 1:
            raise RuntimeError(f"Inductor states no processor among {compiling}")
        return [*kept, f"march={level}"], linking

    cpp_builder._get_optimization_cflags = for_level
