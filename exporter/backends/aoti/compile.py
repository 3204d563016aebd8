"""Compile the calls of a model with AOTInductor: packages without weights.

python -m wanexport.exporter.backends.aoti.compile JOB.json        compiles one call
"""

import platform
import shutil
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.export import ExportedProgram

from wanexport.exporter.backends.aoti.compiler import compiler, compiler_version, restrict_inductor
from wanexport.exporter.backends.backend import Progress
from wanexport.exporter.child.child import known, main, run_process, temporary_folder
from wanexport.exporter.child.process import Lifeline
from wanexport.exporter.child.quiet import quiet
from wanexport.exporter.lint.program import attention_operators, count, lint_program
from wanexport.graphs.graph import empty_graph, load_graph, torch_dtype
from wanexport.graphs.regions import trace_calls, written_inputs
from wanexport.graphs.signature import attention_count
from wanexport.runtime.bundle.durable import write_durably
from wanexport.runtime.engines.device import gpu_or_cpu
from wanexport.runtime.engines.device_name import device_kind
from wanexport.runtime.engines.processor import level_for
from wanexport.runtime.errors import BadRequest, WanExportError, needing_package
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.program import Program

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

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
    """One call of a graph to compile; `graph` names its class, `path` is where the package goes."""

    call: str
    graph: str
    config: dict[str, Any]
    geometry: dict[str, Any]
    dtype: str
    device: str
    path: str


class Regions(NamedTuple):
    """The packages by the call that each is, what lint counted in them, and their seconds."""

    files: dict[str, Path]
    lint: dict[str, int]
    seconds: dict[str, float]


def compile_regions(
    graph: str,
    config: "DataclassInstance",
    geometry: Geometry,
    dtype: str,
    device: str,
    folder: Path,
    progress: Progress = lambda stage, done, total: None,
) -> Regions:
    """Write a package for each call of a graph's Program, as `embed.pt2`; graph names its class.

    They are compiled at once, each in a process of its own. Raises WanExportError when the compiler
    is missing, fails, or makes what cannot be loaded.
    """
    check_compiler(device)
    program = load_graph(graph).describe(config, geometry)
    files = {name: folder / f"{name}.pt2" for name in program.functions}
    progress("compiling", 0, len(files))
    results: dict[str, dict[str, Any]] = {}
    with temporary_folder() as scratch, ThreadPoolExecutor(len(files)) as pool, Lifeline() as line:
        job = RegionJob("", graph, asdict(config), asdict(geometry), dtype, device, "")

        def compile_in_child(name: str) -> dict[str, Any]:
            own = replace(job, call=name, path=str(scratch / f"{name}.pt2"))
            return run_process("backends.aoti.compile", own, scratch, advice=_ADVICE, lifeline=line)

        running = {pool.submit(compile_in_child, name): name for name in files}
        for number, done in enumerate(as_completed(running)):
            name = running[done]
            results[name] = done.result()
            # Of a child that outlives this process by an instant, nothing reaches the bundle.
            write_durably(files[name], (scratch / f"{name}.pt2").read_bytes())
            progress("compiling", number + 1, len(files))
    _check_attentions(program, results)
    counts: Counter[str] = Counter()
    for result in results.values():
        counts.update(result["lint"])
    return Regions(files, dict(counts), {name: r["seconds"] for name, r in results.items()})


def _check_attentions(program: Program, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise RuntimeError when the calls have not the attention operators that the Program has."""
    # A commit runs calls of a step once more, without a velocity.
    calls = [call for call in program.calls if call.when != "commit"]
    found = sum(results[call.function]["attentions"] * call.repeat for call in calls)
    if found != attention_count(program):
        raise RuntimeError(
            f"unclean graph: {found} attention operators, the model has {attention_count(program)}"
        )


def compile_region(job: RegionJob) -> dict[str, Any]:
    """Compile one call; return its lint counts, attention operators and seconds.

    Raises WanExportError when the compiler fails or makes what cannot be loaded, RuntimeError when
    the graph is not clean: a fault of ours.
    """
    started = time.monotonic()
    exported, writable = _trace(job)
    findings = lint_program(exported, writable=writable)
    if findings:
        raise RuntimeError(f"unclean graph: {findings[0]}, and {len(findings) - 1} more")
    path, kind = Path(job.path), device_kind(job.device)
    restrict_inductor(level_for(kind))
    if kind != "cpu":
        _take_no_vector_instructions()
    _compile(exported, path)
    _check_linkage(path)
    return {
        "lint": count(findings),
        "attentions": attention_operators(exported),
        "seconds": round(time.monotonic() - started, 2),
    }


def _trace(job: RegionJob) -> tuple[ExportedProgram, tuple[str, ...]]:
    """The call as a graph, and which of its inputs it may write."""
    on_gpu = job.device != "cpu"
    if on_gpu:  # whose kernels are compiled for the current GPU
        torch.cuda.set_device(gpu_or_cpu(job.device))
    config = load_graph(job.graph).sizes(**job.config)
    graph = empty_graph(
        job.graph, config, Geometry(**job.geometry), torch_dtype(job.dtype),
        device=job.device, fused=on_gpu,
    )  # fmt: skip
    exported = trace_calls(graph, job.device, [job.call])[job.call]
    (call,) = (call for call in graph.program.calls if call.name == job.call)
    return exported, written_inputs(exported, len(call.state))


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
    if not level_for(device_kind(device)):
        raise BadRequest(
            f"AOTInductor engines are built on x86-64 and ARM64 processors, not on "
            f"{platform.machine()}: choose --backend onnx"
        )
    compiler_version()
    if device != "cpu":
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
