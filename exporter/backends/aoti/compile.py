"""Compile the regions of a model with AOTInductor: three packages without weights.

python -m wanexport.exporter.backends.aoti.compile JOB.json        compiles one region
"""

import platform
import shutil
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

from wanexport.exporter.backends.aoti.compiler import compiler, compiler_version, restrict_inductor
from wanexport.exporter.backends.backend import Progress
from wanexport.exporter.child.child import known, main, run_process, temporary_folder
from wanexport.exporter.child.process import Lifeline
from wanexport.exporter.child.quiet import quiet
from wanexport.exporter.lint.program import count, lint_program
from wanexport.graphs.regions import trace_regions
from wanexport.graphs.signature import attention_count
from wanexport.graphs.wan import Block
from wanexport.graphs.weights import DTYPES
from wanexport.runtime.bundle.durable import write_durably
from wanexport.runtime.bundle.signature import REGIONS
from wanexport.runtime.engines.processor import level_for
from wanexport.runtime.errors import WanExportError, needing_package
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.wan_config import WanConfig

_ADVICE = "try another C++ compiler with CXX, else report this"
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
    progress("compiling", 0, len(files))
    counts: Counter[str] = Counter()
    seconds = {}
    with temporary_folder() as scratch, ThreadPoolExecutor(len(files)) as pool, Lifeline() as line:

        def compile_in_child(name: str) -> dict[str, Any]:
            path = str(scratch / f"{name}.pt2")
            job = RegionJob(name, asdict(config), asdict(geometry), dtype, device, path)
            return run_process("backends.aoti.compile", job, scratch, advice=_ADVICE, lifeline=line)

        running = {pool.submit(compile_in_child, name): name for name in files}
        for number, done in enumerate(as_completed(running)):
            result, name = done.result(), running[done]
            # Of a child that outlives this process by an instant, nothing reaches the bundle.
            write_durably(files[name], (scratch / f"{name}.pt2").read_bytes())
            counts.update(result["lint"])
            seconds[name] = result["seconds"]
            progress("compiling", number + 1, len(files))
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
    restrict_inductor(level_for(job.device))
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
        except (CppCompileError, InductorError) as error:
            if known(error):  # a full disk, say, of which Inductor makes an error of its own
                raise
            lines = [line for line in str(error).splitlines() if "rror" in line] or [str(error)]
            raise WanExportError(
                f"AOTInductor cannot compile {path.stem}: {' '.join(lines[0].split())[:300]}"
            ) from error
        shutil.move(package, path)


def check_compiler(device: str) -> None:
    """Raise WanExportError when there is no C++ compiler, or no Triton where it is needed.

    Also on a kind of processor whose levels of instructions have no names here.
    """
    if not level_for(device):
        raise WanExportError(
            f"AOTInductor engines are built on x86-64 and ARM64 processors, not on "
            f"{platform.machine()}: choose --backend onnx"
        )
    compiler_version()
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
                raise WanExportError(
                    f"the compiler {compiler()} links libstdc++ statically, and what it makes "
                    f"crashes when PyTorch loads it: set CXX to a g++ that links it dynamically"
                )


if __name__ == "__main__":
    main(sys.argv[1], lambda job: compile_region(RegionJob(**job)))
