"""How the command line shows the results of commands, as text and tables."""

from collections.abc import Callable
from typing import Any

from rich.text import Text

from wanexport.exporter.cli.display_bundle import card_lines
from wanexport.exporter.cli.terminal import in_bytes, in_short, new_table, out, short, write
from wanexport.runtime.errors import printable

_MOST_LEFT = 20  # places that `lint --fix` names
_MOST_FINDINGS = 5  # of one kind that `lint` names


def show_run(record: dict[str, Any]) -> None:
    """What was made, and how fast."""
    write(
        out,
        (record["output"], "bold"),
        f": {_made(record)}, seed {record['seed']}, {record['solver']}, "
        f"{len(record['timesteps'])} steps",
    )
    stages = {"text": "encode the text", "image": "encode the image", "decode": "decode"}
    shown = [f"{record['load_seconds']} s to load"]
    shown += [
        f"{seconds} s to {stages[stage]}"
        for stage, seconds in record.get("seconds", {}).items()
        if stage in stages and seconds
    ]
    write(
        out,
        f"  {', '.join(shown)}, {record['seconds_per_step']} s/step, {_peak(record)}",
    )
    if record["expert_switch_seconds"]:
        shown = [f"{seconds:.2f} s" for seconds in record["expert_switch_seconds"]]
        write(out, f"  expert switches: {', '.join(shown)}")


def show_stream(record: dict[str, Any]) -> None:
    """What was made, and the time of its chunks."""
    latents, chunks = record["shape"][2], record["chunk_seconds"]
    write(
        out,
        (record["output"], "bold"),
        f": {_made(record)}, seed {record['seed']}, {len(chunks)} chunks of "
        f"{len(record['timesteps'])} steps, {latents} latent frames",
    )
    write(
        out,
        f"  {record['load_seconds']} s to load, {chunks[0]:.3g} s for the first chunk, "
        f"{chunks[-1]:.3g} s for the last, {_peak(record)}",
    )


def _made(record: dict[str, Any]) -> str:
    """The video or the latent that a record is of."""
    if not record["output"].lower().endswith(".mp4"):
        return f"latent {list(record['shape'])}"
    size = f"height {record['height']}, width {record['width']}"
    return f"{record['frames']} frames at {record['fps']} fps, {size}"


def _peak(record: dict[str, Any]) -> str:
    """The memory that a record's process took."""
    gpu = record["peak_gpu_bytes"]
    on_gpu = f", on the GPU {in_bytes(gpu)}" if gpu else ""
    return f"peak memory {in_bytes(record['peak_rss_bytes'])}{on_gpu}"


def show_bench(result: dict[str, Any]) -> None:
    """A row for each arm, why others have none, and the machine."""
    table = new_table(f"{result['engine']}, {result['tokens']} tokens")
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
        table.add_row(*(short(cell(line)) for cell in columns.values()))
    out.print(table)
    for arm, reason in result["failed"].items():
        write(out, ("failed", "red"), f" {arm}: {reason}")
    write(
        out,
        f"{result['machine']}: {result['peak'] / 1e12:.3g} TFLOP/s in "
        f"{result['product_dtype']} matrix products, PyTorch {result['torch']}; "
        f"{result['flops_per_forward'] / 1e12:.3g} TFLOPs a forward, floor "
        f"{1e3 * result['floor_seconds']:.4g} ms",
    )


def _in_milliseconds(line: dict[str, Any]) -> str:
    median, least, most = (1e3 * line[name] for name in ("median", "min", "max"))
    return f"{median:.4g} ({least:.4g} to {most:.4g})"


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def show_lint(result: dict[str, Any]) -> None:
    """Each graph's findings by kind, the first few by name."""
    for name, graph in result["graphs"].items():
        kinds = {kind: number for kind, number in graph["counts"].items() if number}
        verdict = ("not clean", "red") if kinds else ("clean", "green")
        if graph["recorded"]:  # machine code, which nothing reads
            record = "by the record of its build" if graph["counts"] else "by no record"
            verdict = (f"{verdict[0]} {record}", verdict[1])
        absent = ", ".join(kind for kind, number in graph["counts"].items() if not number)
        write(out, (name, "bold"), ": ", verdict, f"; no {absent}")
        for kind, number in kinds.items():
            found = [f for f in graph["findings"] if f["kind"] == kind][:_MOST_FINDINGS]
            places = "; ".join(f"{short(f['node'])} ({short(f['detail'])})" for f in found)
            more = "; ..." if number > len(found) else ""
            write(out, f"  {kind} {number}: {places}{more}")
    if "fix" in result:
        _show_fix(result["fix"])


def _show_fix(fixed: dict[str, Any]) -> None:
    """What was rewritten, what was left and why, and how the two were compared."""
    counts = ", ".join(f"{rule} {number}" for rule, number in fixed["counts"].items())
    write(out, "rewrote ", (counts, "bold"), f"; compared {fixed['compared']}")
    for left in fixed["left"][:_MOST_LEFT]:
        place = f" at {short(left['place'])}" if left["place"] else ""
        write(out, f"  left {short(left['node'])}{place}, {left['rule']}: {short(left['reason'])}")
    if (more := len(fixed["left"]) - _MOST_LEFT) > 0:
        write(out, f"  {more} more are in --json")
    before = {kind: number for kind, number in fixed["before"].items() if number}
    shown = ", ".join(f"{kind} {number}" for kind, number in before.items()) or "nothing"
    write(out, f"  found before: {shown}")
    write(out, "wrote ", (fixed["output"], "bold"))


def show_doctor(record: dict[str, Any]) -> None:
    """The machine, each library, and each task with the command that enables it."""
    machine = record["machine"]
    write(
        out,
        (f"wanexport {record['wanexport']}", "bold"),
        f", Python {machine['python']}, {machine['system']}, {machine['cores']} cores, "
        f"{in_bytes(machine['available_bytes'])} of {in_bytes(machine['memory_bytes'])} memory "
        f"free, {in_bytes(machine['free_disk_bytes'])} disk free here",
    )
    gpus = "; ".join(machine["gpus"]) or "none"
    offline = " (offline)" if machine["hub_offline"] else ""
    write(out, f"  GPU: {gpus}; hub cache: {machine['hub_cache']}{offline}")
    table = new_table()
    for column in ("library", "for", "installed", ""):
        table.add_column(column)
    for library in record["libraries"]:
        problem = library["problem"]
        state = Text(printable(problem, 2000), "red") if problem else Text("ok", "green")
        requirement, version = short(library["requirement"]), short(library["version"] or "-")
        table.add_row(requirement, library["extra"] or "base", version, state)
    out.print(table)
    for task, state in record["tasks"].items():
        verdict = ("yes", "green") if state["usable"] else ("no", "red")
        write(out, f"{task}: ", verdict, "" if state["usable"] else f": {state['command']}")
    for row in record["fits"]:
        what = f"{row['model']} at {row['size']} in bf16"
        for line in card_lines(row["cards"]) if row["cards"] else ["it does not fit"]:
            write(out, f"{short(row['gpu'])}, {what}: {line}")
