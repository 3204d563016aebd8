"""How the command line shows a profile's digest."""

from collections.abc import Iterator
from typing import Any

from wanexport.exporter.cli.terminal import new_table, out, write
from wanexport.runtime.errors import printable

_NAME, _PLACE = 56, 60  # characters of a kernel's name, and of a line's place
_MOST_WAITS = 20


def show_profile(result: dict[str, Any]) -> None:
    """The time of a step by kind, what the GPU and the host did, the waits, and the largest."""
    _show_kinds(result)
    for line in _summary(result):
        write(out, line)
    _show_waits(result["waits"]["lines"])
    if marked := result["waits"].get("marked"):
        _show_waits(marked)
    _show_largest(result)
    if rates := result["rates"]:
        parts = [f"{rates['bytes'] / 1e9:.3g} GB/s in copies"]
        if rates["flops"]:
            parts.insert(0, f"{rates['flops'] / 1e12:.3g} TFLOP/s in {rates['dtype']} products")
        write(out, f"floors: {', '.join(parts)}")
    for note in result["notes"]:
        write(out, ("note: ", "yellow"), note)
    if result["files"]:
        write(out, f"saved {', '.join(result['files'])}")


def _show_kinds(result: dict[str, Any]) -> None:
    title = result["target"]
    if "arm" in result:
        title = result["engine"] or f"{result['arm']}, {result['size']}, {result['dtype']}"
    where = "GPU" if result["gpu"] else "CPU"
    table = new_table(f"{title}: a step takes {_ms(result['seconds_per_step'])} ms, {where} time")
    table.add_column("kind", no_wrap=True)
    _add_figures(table)
    for row in result["kinds"]:
        if row["seconds"]:
            table.add_row(row["kind"], *_figures(row))
    out.print(table)


def _add_figures(table: Any) -> None:
    for name in ("ms", "share", "count", "floor, ms", "% floor"):
        table.add_column(name, justify="right", no_wrap=True)


def _figures(row: dict[str, Any]) -> tuple[str, ...]:
    floor = row["floor_seconds"]
    return (
        _ms(row["seconds"]),
        f"{row['share']:.1%}",
        "-" if row["count"] is None else f"{row['count']:.5g}",
        _ms(floor) if floor else "-",
        f"{100 * floor / row['seconds']:.1f}" if floor and row["seconds"] else "-",
    )


def _summary(result: dict[str, Any]) -> Iterator[str]:
    """What the GPU and the host did in a step, in lines."""
    gpu, host, waits = result["gpu"], result["host"], result["waits"]
    if gpu:
        gaps = f"{gpu['gaps']:.5g} gaps of {_ms(gpu['gap_seconds'])} ms together"
        yield f"GPU: busy {gpu['busy']:.1%}, {gpu['launches']:.5g} launches, {gaps}"
        for gap in gpu["largest_gaps"]:
            yield f"  a gap of {_ms(gap['seconds'])} ms, while the host ran {gap['host']}"
    calls = f", calls of CUDA {_ms(host['call_seconds'])} ms" if gpu else ""
    yield (
        f"host: {_ms(result['host_seconds_per_step'])} ms: {host['operators']:.5g} operators "
        f"{_ms(host['operator_seconds'])} ms{calls}, outside them {_ms(host['outside_seconds'])} ms"
    )
    parts = []
    if waits["for_gpu"]:
        parts.append(f"{waits['for_gpu']:.4g} for the GPU, {_ms(waits['seconds'])} ms")
    if waits["reads"]:
        parts.append(f"{waits['reads']:.4g} reads of values on the host")
    yield f"host waits: {'; '.join(parts) or 'none'}"


def _show_waits(rows: list[dict[str, Any]]) -> None:
    """The lines that wait, most time first; what the profiler's stacks say of is a function."""
    if not rows:
        return
    table = new_table("Lines that wait, or would with tensors on a GPU")
    for name in ("line", "in", "called", "cause"):
        table.add_column(name, no_wrap=True)
    for name in ("times", "ms", "for the GPU"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows[:_MOST_WAITS]:
        place = row["line"] or "unknown"
        table.add_row(
            printable(place if row["is_exact"] in (True, None) else f"below {place}", _PLACE),
            printable(row["function"] or "-", 24),
            printable(row["called"] or "-", 24),
            printable(row["cause"], 32),
            f"{row['count']:g}",
            _ms(row["seconds"]),
            "yes" if row["for_gpu"] else "no",
        )
    out.print(table)
    if len(rows) > _MOST_WAITS:
        write(out, f"and {len(rows) - _MOST_WAITS} more, which --json lists")


def _show_largest(result: dict[str, Any]) -> None:
    table = new_table("The largest kernels" if result["gpu"] else "The largest operators")
    table.add_column("name", no_wrap=True)
    table.add_column("kind", no_wrap=True)
    _add_figures(table)
    for row in result["largest"]:
        table.add_row(printable(row["name"], _NAME), row["kind"], *_figures(row))
    out.print(table)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.4g}"
