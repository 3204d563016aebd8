"""How the command line shows results: text and tables on standard output, progress on the other."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

out = Console(soft_wrap=True, highlight=False)
out.width = max(out.width, 120)  # a narrow terminal wraps a table; rich would cut its figures
err = Console(stderr=True, soft_wrap=True, highlight=False)

_MOST_FINDINGS = 5  # of one kind that `lint` names


def show_build(record: dict[str, Any]) -> None:
    """The engines and weights that a build made or reused."""
    for engine in record["engines"]:
        geometry, proof = engine["geometry"], engine["proof"]
        size = sum(file["size"] for file in engine["files"].values())
        out.print(
            f"[bold]{escape(record['bundle'])}[/]: {record['model']}, height {geometry['height']}, "
            f"width {geometry['width']}, {geometry['frames']} frames, {record['tokens']} tokens"
        )
        out.print(f"  engine {engine['name']}: {in_bytes(size)}")
        if engine["attention"]:
            out.print(f"  attention: {_attention(engine)}")
        if "attention_expected" in engine["build"]:
            out.print(f"  {_plan(engine['build'])}")
        out.print(
            f"  proof: {proof['method']}, {proof['blocks']} blocks at {proof['tokens']} tokens; "
            f"relative L2 error {proof['error']:.1e}, gate {proof['gate']:.1e}"
        )
    for name, file in record["weights"].items():
        out.print(f"  weights {name}: {in_bytes(file['size'])}")
    if record["reused"]:
        out.print(f"  reused: {', '.join(record['reused'])}")
    out.print(f"  {record['seconds']} s, peak memory {in_bytes(record['peak_rss_bytes'])}")


def _attention(engine: dict[str, Any]) -> str:
    return ", ".join(f"{name} to {keys} keys" for keys, name in engine["attention"].items())


def _plan(build: dict[str, Any]) -> str:
    """What is known of a TensorRT plan: its attention, memory and build."""
    found, expected = build["attention_layers"], build["attention_expected"]
    known = [f"{found} of {expected} attention layers native"]
    if build["attention_kernels"] is not None:
        known.append(f"{build['attention_kernels']} attention kernels")
    if build["activation_bytes"] is not None:
        known.append(f"activations {in_bytes(build['activation_bytes'])}")
    known.append(f"built in {build['plan_seconds']} s at {in_bytes(build['plan_peak_rss_bytes'])}")
    return f"plan: {', '.join(known)}"


def show_run(record: dict[str, Any]) -> None:
    """What was made, and how fast."""
    made = f"latent {list(record['shape'])}"
    if record["output"].lower().endswith(".mp4"):
        size = f"height {record['height']}, width {record['width']}"
        made = f"{record['frames']} frames at {record['fps']} fps, {size}"
    out.print(
        f"[bold]{escape(record['output'])}[/]: {made}, seed {record['seed']}, "
        f"{record['solver']}, {len(record['timesteps'])} steps"
    )
    stages = {"text": "encode the text", "image": "encode the image", "decode": "decode"}
    shown = [f"{record['load_seconds']} s to load"]
    shown += [
        f"{seconds} s to {stages[stage]}"
        for stage, seconds in record.get("seconds", {}).items()
        if stage in stages and seconds
    ]
    out.print(
        f"  {', '.join(shown)}, {record['seconds_per_step']} s/step, "
        f"peak memory {in_bytes(record['peak_rss_bytes'])}"
        + (f", on the GPU {in_bytes(gpu)}" if (gpu := record["peak_gpu_bytes"]) else "")
    )
    if record["expert_switch_seconds"]:
        shown = [f"{seconds:.2f} s" for seconds in record["expert_switch_seconds"]]
        out.print(f"  expert switches: {', '.join(shown)}")


def show_compare(result: dict[str, Any]) -> None:
    """A row for each step, the times, and the verdict; what no step has is left out."""
    title = f"{result['engine']} against {result['reference']}"
    title += f" with the tensors of {result['model']}" if result["model"] else ""
    table = _table(escape(title))
    names = (
        "error", "floor", "recorded", "rounding", "gate", "eager", "max", "p99", "solver", "drift",
    )  # fmt: skip
    shown = [name for name in names if any(row[name] is not None for row in result["steps"])]
    for name in ("step", *shown, "1 - cosine", "NaN", "Inf", "passed"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in result["steps"]:
        distance = None if row["cosine"] is None else max(0.0, 1 - row["cosine"])
        figures = [in_short(row[name]) for name in shown] + [in_short(distance)]
        counts = [str(row["nan"]), str(row["inf"])]
        table.add_row(str(row["step"]), *figures, *counts, "yes" if row["passed"] else "no")
    out.print(table)
    seconds = result["seconds"]
    reference = seconds["reference_call"]
    out.print(
        f"{seconds['open']} s to open the engine, {seconds['engine_call']} s a call"
        + (f" ({reference} s in eager fp32)" if reference else "")
        + f", peak memory {in_bytes(result['peak_rss_bytes'])}"
    )
    if polygraphy := result["polygraphy"]:
        out.print(f"saved {escape(', '.join(polygraphy['files']))}")
        if polygraphy["note"]:
            out.print(f"no polygraphy command: {escape(polygraphy['note'])}")
        for command in polygraphy["commands"]:
            out.print(escape(command))
    verdict = "[green]passed[/]" if result["passed"] else "[red]failed[/]"
    out.print(f"{result['engine']}: {verdict}")


def show_bench(result: dict[str, Any]) -> None:
    """A row for each arm, why others have none, and the machine."""
    table = _table(escape(f"{result['engine']}, {result['tokens']} tokens"))
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "arm": lambda line: line["arm"],
        "ms a forward": _in_milliseconds,
        "TFLOP/s": lambda line: f"{line['tflops']:.3g}",
        "% floor": lambda line: f"{line['percent_of_floor']:.1f}",
        "memory": lambda line: in_bytes(line["peak_bytes"]),
        "start, s": lambda line: f"{line['cold_start']['first_step']:.1f}",
        "1st/rest": lambda line: f"{line['first_to_steady']:.2f}",
        "build, s": lambda line: _or_dash(line["compile_seconds"], ".1f"),
        "differs": lambda line: in_short(line["difference"]),
    }
    if any(line["host_syncs"] is not None for line in result["arms"]):
        columns["waits"] = lambda line: _or_dash(line["host_syncs"], "g")
        columns["busy"] = lambda line: _or_dash(line["gpu_busy"], ".1%")
    for name in columns:
        table.add_column(name, justify="left" if name == "arm" else "right", no_wrap=True)
    for line in result["arms"]:
        table.add_row(*(cell(line) for cell in columns.values()))
    out.print(table)
    for verdict, colour in (("failed", "red"), ("skipped", "yellow")):
        for arm, reason in result[verdict].items():
            out.print(f"[{colour}]{verdict}[/] {arm}: {escape(reason)}")
    out.print(
        f"{escape(result['machine'])}: {result['peak'] / 1e12:.3g} TFLOP/s in "
        f"{result['product_dtype']} matrix products, PyTorch {result['torch']}; "
        f"{result['flops_per_forward'] / 1e12:.3g} TFLOPs a forward, floor "
        f"{1e3 * result['floor_seconds']:.4g} ms"
    )


def _in_milliseconds(line: dict[str, Any]) -> str:
    median, least, most = (1e3 * line[name] for name in ("median", "min", "max"))
    return f"{median:.4g} ({least:.4g} to {most:.4g})"


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _table(title: str | None = None) -> Table:
    return Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))


def show_lint(result: dict[str, Any]) -> None:
    """Each graph's findings by kind, the first few by name."""
    for name, graph in result["graphs"].items():
        kinds = {kind: number for kind, number in graph["counts"].items() if number}
        verdict = "[red]not clean[/]" if kinds else "[green]clean[/]"
        if graph["recorded"]:  # machine code, which nothing reads
            verdict += " by the record of its build" if graph["counts"] else " by no record"
        absent = ", ".join(kind for kind, number in graph["counts"].items() if not number)
        out.print(f"[bold]{escape(name)}[/]: {verdict}; no {absent}")
        for kind, number in kinds.items():
            found = [f for f in graph["findings"] if f["kind"] == kind][:_MOST_FINDINGS]
            places = "; ".join(f"{f['node']} ({f['detail']})" for f in found)
            more = "; ..." if number > len(found) else ""
            out.print(f"  {kind} {number}: {escape(places)}{more}")


def show_inspect(record: dict[str, Any]) -> None:
    """The model, its weights, and a row for each engine."""
    config, parameters = record["config"], record["parameters"]
    size = f"{parameters / 1e9:.2f} billion parameters, " if parameters else ""
    experts = f", experts {' and '.join(record['experts'])}" if record["experts"] else ""
    out.print(
        f"[bold]{escape(record['bundle'])}[/]: {record['model']}{experts}, {size}dim "
        f"{config['dim']}, {config['num_heads']} heads, {config['num_layers']} blocks; "
        f"{in_bytes(record['bytes'])}, built by wanexport {record['wanexport']}"
    )
    for name, weights in record["weights"].items():
        source = ", ".join(f"{k} {v}" for k, v in weights["source"].items() if k != "files")
        out.print(f"  weights {name}: {in_bytes(weights['file']['size'])}, from {escape(source)}")
    for engine in record["engines"]:
        for line in _engine_lines(engine):
            out.print(escape(line))
    if not record["problems"]:
        checked = "every hash" if record["verified"] else "sizes, headers and engines"
        out.print(f"{checked} verified")


def _engine_lines(engine: dict[str, Any]) -> Iterator[str]:
    proof, parity, sampling = engine["proof"], engine["parity"], engine["sampling"]
    flops = engine["build"].get("flops_per_forward", 0) / 1e12
    yield (
        f"  engine {engine['name']}: {engine['tokens']} tokens, {in_bytes(engine['bytes'])}, "
        f"{flops:.3g} TFLOPs a forward"
    )
    yield f"    target: {', '.join(f'{name} {value}' for name, value in engine['target'].items())}"
    if engine["attention"]:
        yield f"    attention: {_attention(engine)}"
    if proof:
        yield (
            f"    proof: {proof['method']}, {proof['blocks']} blocks at {proof['tokens']} tokens; "
            f"error {in_short(proof['error'])}, gate {in_short(proof['gate'])}"
        )
    compared = "not compared yet"
    if parity:
        verdict = "passed" if parity["passed"] else "failed"
        compared = f"{verdict} against {parity['reference']}; error {in_short(parity['error'])}"
    yield f"    parity: {compared}"
    yield f"    lint: {sum(engine['lint'].values())} findings"
    guidance = ", ".join(f"{g:g}" for g in dict.fromkeys(sampling["guidance"]))
    boundary = f", experts meet at {sampling['boundary']}" if sampling["boundary"] else ""
    yield (
        f"    sampling: {sampling['solver']}, {sampling['steps']} steps, shift "
        f"{sampling['shift']:g}, guidance {guidance}{boundary}, {sampling['fps']} fps"
    )


def show_doctor(record: dict[str, Any]) -> None:
    """The machine, each library, and each task with the command that enables it."""
    machine = record["machine"]
    out.print(
        f"[bold]wanexport {record['wanexport']}[/], Python {machine['python']}, "
        f"{machine['system']}, {machine['cores']} cores, {in_bytes(machine['available_bytes'])} of "
        f"{in_bytes(machine['memory_bytes'])} memory free, {in_bytes(machine['free_disk_bytes'])} "
        f"disk free here"
    )
    gpus = "; ".join(machine["gpus"]) or "none"
    offline = " (offline)" if machine["hub_offline"] else ""
    out.print(f"  GPU: {escape(gpus)}; hub cache: {escape(str(machine['hub_cache']))}{offline}")
    table = _table()
    for column in ("library", "for", "installed", ""):
        table.add_column(column)
    for library in record["libraries"]:
        state = f"[red]{escape(library['problem'])}[/]" if library["problem"] else "[green]ok[/]"
        requirement = escape(library["requirement"])
        table.add_row(requirement, library["extra"] or "base", library["version"] or "-", state)
    out.print(table)
    for task, state in record["tasks"].items():
        verdict = "[green]yes[/]" if state["usable"] else f"[red]no[/]: {escape(state['command'])}"
        out.print(f"{task}: {verdict}")


def in_short(value: float | None) -> str:
    """A figure in scientific notation, or a dash where there is none."""
    return "-" if value is None else f"{value:.1e}"


def in_bytes(count: float) -> str:
    """A size in decimal units."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


@contextmanager
def progress_display() -> Iterator[Callable[[str, int, int], None]]:
    """A live progress display on standard error: a line for each stage, silent when piped."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bars:
        task = bars.add_task("", total=None)
        current = ""

        def show(stage: str, done: int, total: int) -> None:
            nonlocal current
            name = stage.partition(",")[0]  # what follows the comma changes within a stage
            if name != current:
                current = name
                bars.reset(task)  # restarts the clock
            bars.update(task, description=stage, completed=done, total=total or None)

        yield show
