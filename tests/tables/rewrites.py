"""What `rewrite` does to models that are not ours: counts, bits, ScatterND and time of both.

    python -m tests.tables.rewrites [FRAMESxROWSxCOLUMNS [ROUNDS [FOLDER]]]

of the grid of tokens, 3x4x6 by default. FOLDER keeps the GPU's packages, and only their times are
measured: a second run finds them and compiles nothing. Models are those of
`tests.oracles.foreign_models`: two blocks of two heads. Times are medians in ms of rounds that
alternate between the two: ONNX Runtime on a CPU in fp32, and AOTInductor in fp32 on a CPU, and in
bf16 on a GPU where there is one. ScatterND are counted in what torch.onnx.export makes of the
program, and once more after `lint --fix` of that ONNX file.
"""

import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass
from torch.utils import _pytree as pytree

from tests.oracles.foreign_models import DTYPES, GRID, LAYERS, MODELS, Exported, Grid
from wanexport.exporter.child.quiet import quiet
from wanexport.exporter.rewrite.fix_onnx import fix_onnx
from wanexport.exporter.rewrite.proof import Proof
from wanexport.exporter.rewrite.record import RULES, STRIDED_WRITES, Rewriting
from wanexport.exporter.rewrite.rewrite import rewrite
from wanexport.runtime.errors import WanExportError, first_line

HEAD = (
    "model", "counts", "bit-exact in fp32, fp16, bf16", "ScatterND a block",
    "after --fix of the ONNX file", "ONNX Runtime, CPU", "AOTInductor, CPU", "AOTInductor, GPU",
)  # fmt: skip


def export(made: Exported) -> ExportedProgram:
    """The program of a model."""
    model, args, kwargs = made
    with torch.no_grad(), quiet("torch"):
        return torch.export.export(model, args, kwargs)


def exactness(make: Callable[..., Exported], grid: Grid) -> tuple[Rewriting, list[str]]:
    """The counts, and in each precision whether all results keep their bits."""
    said = []
    for dtype in DTYPES:
        program = export(make(dtype, grid))
        proof = Proof(program)
        found = rewrite(program)
        try:
            proof.check(program, "any")
            said.append("yes")
        except WanExportError as error:
            said.append(str(error))
        if dtype is DTYPES[0]:
            counts = found
    return counts, said


def to_onnx(program: ExportedProgram, path: Path) -> Path | str:
    """The program in ONNX, or why there is none."""
    try:
        with torch.no_grad(), quiet("torch"):
            made = torch.onnx.export(program, dynamo=True, opset_version=20, verbose=False)
        assert made is not None
        made.save(path)
    except torch.onnx.OnnxExporterError as error:
        reason = re.search(r"Failure message: (.*)", str(error))
        return reason[1] if reason else first_line(error)
    return path


def scatters(path: Path | str) -> str:
    """ScatterND a block, or why there is no graph."""
    if isinstance(path, str):
        return f"no export: {path}"
    graph = onnx.load(path, load_external_data=False).graph
    return f"{sum(node.op_type == 'ScatterND' for node in graph.node) / LAYERS:g}"


def medians(calls: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
    """The median time of each call in ms; the calls alternate."""
    times: list[list[float]] = [[] for _ in calls]
    for number in range(rounds + 2):
        for call, taken in zip(calls, times):
            started = time.perf_counter()
            call()
            if number > 1:
                taken.append(1000 * (time.perf_counter() - started))
    return [statistics.median(taken) for taken in times]


def time_onnx(paths: list[Path | str], given: list[Tensor], rounds: int) -> str:
    """Both in ONNX Runtime on a CPU."""
    import onnxruntime

    calls = []
    for path in paths:
        if isinstance(path, str):
            return "-"
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [one.name for one in session.get_inputs()]
        feeds = {name: one.numpy() for name, one in zip(names, given)}
        calls.append(partial(session.run, None, feeds))
    before, after = medians(calls, rounds)
    return f"{before:.1f} -> {after:.1f}"


def time_aoti(
    make: Callable[..., Exported], grid: Grid, device: str, rounds: int, folder: Path
) -> str:
    """Both as AOTInductor packages of a folder; the program is rewritten on the CPU and moved."""
    if device == "cuda" and not torch.cuda.is_available():
        return "-"
    made = make(torch.bfloat16 if device == "cuda" else torch.float32, grid)
    given = pytree.tree_map_only(Tensor, lambda t: t.to(device), made[1:])
    calls = []
    for name in ("before", "after"):
        package = folder / f"{name}.pt2"
        if not package.exists():
            compile_package(made, device, package, is_rewritten=name == "after")
        loaded = torch._inductor.aoti_load_package(str(package))
        calls.append(partial(_call, loaded, given, device))
    before, after = medians(calls, rounds)
    return f"{before:.2f} -> {after:.2f}"


def compile_package(made: Exported, device: str, package: Path, *, is_rewritten: bool) -> None:
    """Compile a model's program, rewritten or not, for a device."""
    program = export(made)
    if is_rewritten:
        rewrite(program)
    if device == "cuda":
        program = move_to_device_pass(program, f"{device}:0")
    package.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad(), quiet("torch"):
        torch._inductor.aoti_compile_and_package(program, package_path=str(package))


def _call(loaded: Any, given: Any, device: str) -> None:
    """Run a package to its end."""
    loaded(*given[0], **given[1])
    if device == "cuda":
        torch.cuda.synchronize()


def row(name: str, grid: Grid, rounds: int) -> Sequence[str]:
    """All of one model."""
    make = MODELS[name]
    counts, exact = exactness(make, grid)
    made = make(torch.float32, grid)
    before, after = export(made), export(made)
    rewrite(after)
    given = pytree.tree_leaves(made[1:])
    with tempfile.TemporaryDirectory() as folder:
        paths = [to_onnx(before, Path(folder) / "a.onnx"), to_onnx(after, Path(folder) / "b.onnx")]
        fixed = "-"
        if isinstance(paths[0], Path):
            done, uncompared = fix_onnx(paths[0], Path(folder) / "c.onnx")
            fixed = f"{scatters(Path(folder) / 'c.onnx')} ({done.counts[STRIDED_WRITES]} rewritten"
            fixed += f", {uncompared or 'bit for bit'})"
        onnx_time = time_onnx(paths, given, rounds)
        shown = f"{scatters(paths[0])} -> {scatters(paths[1])}"
        aoti = [
            _or_reason(time_aoti, make, grid, device, rounds, Path(folder) / device)
            for device in ("cpu", "cuda")
        ]
    fired = ", ".join(f"{rule} {counts.counts[rule]}" for rule in RULES if counts.counts[rule])
    return (name, fired, ", ".join(exact), shown, fixed, onnx_time, *aoti)


def _or_reason(measure: Callable[..., str], *arguments: Any) -> str:
    try:
        return measure(*arguments)
    except Exception as error:
        return f"no: {type(error).__name__}: {first_line(error)[:80]}"


def main(sizes: str = "x".join(map(str, GRID)), rounds: str = "20", folder: str = "") -> None:
    """Print the table, or with a folder its last column."""
    frames, rows, columns = map(int, sizes.split("x"))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {gpu}, grid {sizes}")
    grid, head = (frames, rows, columns), (HEAD[0], HEAD[-1]) if folder else HEAD
    cells: Sequence[str]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for name, make in MODELS.items():
        if folder:
            kept = Path(folder) / sizes / name
            cells = (name, _or_reason(time_aoti, make, grid, "cuda", int(rounds), kept))
        else:
            cells = row(name, grid, int(rounds))
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
