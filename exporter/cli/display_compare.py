"""How the command line shows what `compare` found."""

from typing import Any

from wanexport.exporter.cli.terminal import in_bytes, in_short, new_table, out, short, write


def show_compare(result: dict[str, Any]) -> None:
    """A row for each step, the times, and the verdict; what no step has is left out."""
    _show_steps(result)
    if bisect := result["bisect"]:
        _show_calls(bisect)
    seconds = result["seconds"]
    reference = seconds["reference_call"]
    write(
        out,
        f"{seconds['open']} s to open the engine, {seconds['engine_call']} s a call"
        + (f" ({reference} s in eager fp32)" if reference else "")
        + f", peak memory {in_bytes(result['peak_rss_bytes'])}",
    )
    if polygraphy := result["polygraphy"]:
        write(out, f"saved {', '.join(polygraphy['files'])}")
        if polygraphy["note"]:
            write(out, f"no polygraphy command: {polygraphy['note']}")
        for command in polygraphy["commands"]:
            write(out, command)
    if result["note"]:
        write(out, result["note"])
    if bisect:
        write(out, bisect["verdict"])
    verdict = ("passed", "green") if result["passed"] else ("failed", "red")
    write(out, f"{result['engine']}: ", verdict)


def _show_steps(result: dict[str, Any]) -> None:
    title = str(result["engine"])
    title += f" with weights {result['weights']}" if result["weights"] else ""
    title += f" against {result['reference']}"
    title += f" with the tensors of {result['model']}" if result["model"] else ""
    table = new_table(title)
    names = ["error", "floor", "recorded", "other", "rounding", "gate", "eager"]
    names += ["max", "p99", "drift"]
    shown = [name for name in names if any(row[name] is not None for row in result["steps"])]
    for name in ("step", *shown, "1 - cosine", "NaN", "Inf", "passed"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in result["steps"]:
        distance = None if row["cosine"] is None else max(0.0, 1 - row["cosine"])
        figures = [in_short(row[name]) for name in shown] + [in_short(distance)]
        counts = [str(row["nan"]), str(row["inf"])]
        table.add_row(str(row["step"]), *figures, *counts, "yes" if row["passed"] else "no")
    out.print(table)


def _show_calls(bisect: dict[str, Any]) -> None:
    """A row for each call that tells something: the ends, the worst, and the first faulty one."""
    expert = f", {bisect['expert']}" if bisect["expert"] else ""
    table = new_table(f"The calls of step {bisect['step']}{expert}")
    calls = bisect["calls"]
    names = ("error", "floor", "gate", "carried", "carried_floor")
    shown = [name for name in names if any(row[name] is not None for row in calls)]
    for name in ("call", "value"):
        table.add_column(name, no_wrap=True)
    for name in (*shown, "passed"):
        table.add_column(name.replace("_", " "), justify="right", no_wrap=True)
    last = -1
    for index in _telling(calls):
        if index > last + 1:
            table.add_row("...")
        row, last = calls[index], index
        figures = [in_short(row[name]) for name in shown]
        verdict = "yes" if row["passed"] else "no"
        table.add_row(short(row["call"]), short(row["value"]), *figures, verdict)
    out.print(table)


def _telling(calls: list[dict[str, Any]]) -> list[int]:
    """Which calls are shown: the first two and the last two, the worst, and those about a fault."""
    count = len(calls)
    shown = {0, 1, count - 2, count - 1, max(range(count), key=lambda i: _ratio(calls[i]))}
    first = next((i for i, row in enumerate(calls) if not row["passed"]), None)
    if first is not None:
        shown |= set(range(first - 1, first + 3))
    return sorted(index for index in shown if 0 <= index < count)


def _ratio(row: dict[str, Any]) -> float:
    return float("inf") if row["error"] is None else row["error"] / (row["gate"] or 1.0)
