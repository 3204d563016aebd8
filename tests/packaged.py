"""Each traced call compiled by AOTInductor once a session, with headers that are precompiled.

What is traced is compared whole, and what Inductor is told. The headers are two thirds of what the
compiler reads; that they were precompiled changes nothing of what it makes.
"""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import torch
from torch._inductor import codecache
from torch.export import ExportedProgram

from tests.locked import locked
from tests.traced import digest

_PRECOMPILED = {"aot_inductor.precompile_headers": True, "cpp_cache_precompile_headers": True}


def package_once(folder: Path) -> None:
    """Keep packages and headers in a folder that every process of the session sees."""
    inductor: Any = torch._inductor
    compile_package = inductor.aoti_compile_and_package
    told = _PRECOMPILED if shutil.which("openssl") else {}  # PyTorch hashes headers with it

    def compiled(
        exported: ExportedProgram, *, package_path: str, inductor_configs: dict[str, Any]
    ) -> str:
        path = folder / f"{digest(exported, sorted(inductor_configs.items()))}.pt2"
        with locked(path.with_suffix(".lock")):
            if not path.exists():
                compile_package(
                    exported, package_path=package_path, inductor_configs=inductor_configs | told
                )
                shutil.copyfile(package_path, path)
                return package_path
        return str(shutil.copyfile(path, package_path))

    inductor.aoti_compile_and_package = compiled
    _precompile_once(folder)


def _precompile_once(folder: Path) -> None:
    """Keep headers there too: PyTorch's own cache preprocesses one to see that it is the same."""
    cache: Any = codecache
    precompile = cache._precompile_header

    def precompiled(header: str, command_line: str, **command: Any) -> str:
        flags = sorted((key, value) for key, value in command.items() if key != "vec_isa")
        key = hashlib.sha256(f"{header} {command_line} {flags}".encode()).hexdigest()
        known = folder / f"{key}.header"
        with locked(known.with_suffix(".lock")):
            if not known.exists():
                known.write_text(precompile(header, command_line, **command))
        return known.read_text()

    cache._HEADER_DIR = str(folder)
    cache._precompile_header = precompiled
