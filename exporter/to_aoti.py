"""Compile the regions of a model with AOTInductor: three packages without weights.

python -m wanexport.exporter.to_aoti JOB.json        compiles one region
"""

import os
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch.export import ExportedProgram

from wanexport.exporter.child import main, run_process
from wanexport.exporter.quiet import quiet
from wanexport.exporter.request import Progress
from wanexport.graphs.lint import count, lint_program
from wanexport.graphs.model import Block
from wanexport.graphs.regions import trace_regions
from wanexport.graphs.signature import attention_count
from wanexport.graphs.weights import DTYPES
from wanexport.runtime.durable import write_durably
from wanexport.runtime.errors import WanExportError, needing_package
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.signature import REGIONS
from wanexport.runtime.wan_config import WanConfig

_CONFIGS = {
    # What the processor says it can do is taken as true: trying it imports PyTorch several times.
    "cpp.vec_isa_ok": True,
    # A package is compiled once: precompiling its headers takes longer than they save.
    "cpp_cache_precompile_headers": False,
    "aot_inductor.precompile_headers": False,
    # Of the C++ that launches kernels, not of kernels.
    "aot_inductor.compile_wrapper_opt_level": "O0",
    # Of kernels that sum in different orders none is chosen by its time: a rebuild gives the same.
    "deterministic": True,
}


@dataclass(frozen=True)
class RegionJob:
    """One region to compile; `path` is where its package goes."""

    region: str
    config: dict[str, Any]
    geometry: dict[str, Any]
    dtype: str
    device: str
    path: str


def compile_regions(
    config: WanConfig,
    geometry: Geometry,
    dtype: str,
    device: str,
    folder: Path,
    progress: Progress = lambda stage, done, total: None,
) -> tuple[dict[str, Path], dict[str, int], dict[str, float]]:
    """Write embed.pt2, block.pt2 and head.pt2; return them, lint counts, and seconds of each.

    The regions are compiled at once, each in a process of its own. Raises WanExportError when the
    compiler is missing, fails, or makes what cannot be loaded.
    """
    check_compiler(device)
    files = {name: folder / f"{name}.pt2" for name in REGIONS}
    jobs = [
        RegionJob(name, asdict(config), asdict(geometry), dtype, device, str(path))
        for name, path in files.items()
    ]
    progress("compiling", 0, len(jobs))
    counts: Counter[str] = Counter()
    seconds = {}
    with ThreadPoolExecutor(len(jobs)) as pool, TemporaryDirectory() as scratch:
        running = {pool.submit(run_process, "to_aoti", job, Path(scratch)): job for job in jobs}
        for number, done in enumerate(as_completed(running)):
            result = done.result()
            counts.update(result["lint"])
            seconds[running[done].region] = result["seconds"]
            progress("compiling", number + 1, len(jobs))
    return files, dict(counts), seconds


def compile_region(job: RegionJob) -> dict[str, Any]:
    """Compile one region; return its lint counts and seconds.

    Raises WanExportError when the compiler fails or makes what cannot be loaded, RuntimeError when
    the graph is not clean: a fault of ours.
    """
    started = time.monotonic()
    config, geometry = WanConfig(**job.config), Geometry(**job.geometry)
    dtype, block = DTYPES[job.dtype], _block_of(job.device)
    program = trace_regions(config, geometry, dtype, job.device, block, [job.region])[job.region]
    per_block = attention_count(config) // config.num_layers
    findings = lint_program(program, per_block if job.region == "block" else 0)
    if findings:
        raise RuntimeError(f"unclean graph: {findings[0]}, and {len(findings) - 1} more")
    path = Path(job.path)
    if job.device == "cuda":
        _take_no_vector_instructions()
    _compile(program, path)
    _check_linkage(path)
    return {"lint": count(findings), "seconds": round(time.monotonic() - started, 2)}


def _block_of(device: str) -> Callable[[WanConfig], Block]:
    if device == "cpu":
        return Block
    from wanexport.graphs.fused_block import FusedBlock  # needs Triton

    return FusedBlock


def _take_no_vector_instructions() -> None:
    """Spare this process the trial programs, a third of its time, that tell Inductor what the host
    can do: a GPU's package has no host code to vectorise."""
    from torch._inductor import cpu_vec_isa

    cpu_vec_isa.supported_vec_isa_list.clear()


def _compile(program: ExportedProgram, path: Path) -> None:
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.exc import CppCompileError, InductorError

    # Inductor writes the package where it likes only under a .pt2 name of its own.
    with TemporaryDirectory() as scratch, quiet("torch._inductor"):
        package = Path(scratch) / "model.pt2"
        try:
            aoti_compile_and_package(program, package_path=str(package), inductor_configs=_CONFIGS)
        except (CppCompileError, InductorError, OSError) as error:
            lines = [line for line in str(error).splitlines() if "rror" in line] or [str(error)]
            raise WanExportError(
                f"AOTInductor cannot compile {path.stem}: {' '.join(lines[0].split())[:300]}"
            ) from error
        write_durably(path, package.read_bytes())


def check_compiler(device: str) -> None:
    """Raise WanExportError when there is no C++ compiler, or no Triton where it is needed."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        stated = os.environ.get("CXX")
        raise WanExportError(
            f"no C++ compiler works{f' (CXX is {stated})' if stated else ''}, a build with "
            f"AOTInductor needs one: install g++, or set CXX to one"
        ) from error
    if device == "cuda":
        with needing_package("triton", "AOTInductor on a GPU"):
            import triton  # noqa: F401


def _check_linkage(package: Path) -> None:
    """Refuse a package whose code has a C++ runtime of its own: it crashes in libtorch's process.

    Raises WanExportError naming the compiler.
    """
    with zipfile.ZipFile(package) as archive:
        for name in archive.namelist():
            if name.endswith(".so") and b"libstdc++.so" not in archive.read(name):
                compiler = os.environ.get("CXX", "g++")
                raise WanExportError(
                    f"the compiler {compiler} links libstdc++ statically, and what it makes "
                    f"crashes when PyTorch loads it: set CXX to a g++ that links it dynamically"
                )


if __name__ == "__main__":
    main(sys.argv[1], lambda job: compile_region(RegionJob(**job)))
