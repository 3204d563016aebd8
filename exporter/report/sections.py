"""The sections of a report: what one command saved, as a part of the page."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from wanexport.exporter.compare.bisect import over_gate
from wanexport.exporter.compare.curves import curves
from wanexport.exporter.compare.plot import charts_of
from wanexport.exporter.report.charts import bars, roofline
from wanexport.exporter.report.commands import bench_command, compare_command, profile_command
from wanexport.exporter.report.figures import count, number, scientific, seconds, share
from wanexport.exporter.report.saved import Saved
from wanexport.runtime.bundle.manifest import EngineRecord

_MOST_LINES = 20
Row = Mapping[str, Any]


@cache
def templates() -> Environment:
    """The page's templates; every value in them is escaped."""
    loader = PackageLoader("wanexport.exporter.report", "")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined)


def section(saved: Saved, bundle: str, engine: EngineRecord | None) -> Markup:
    """The part of the page that shows what was saved.

    Raises BadRequest when the file is not what this version saves.
    """
    try:
        return render(f"{saved.kind}.html.j2", _values(saved, bundle, engine))
    except Exception as error:  # of whatever a file that is none of ours leads to
        raise saved.unreadable(error) from error


def _values(saved: Saved, bundle: str, engine: EngineRecord | None) -> dict[str, Any]:
    """What the template of the section takes; only a profile may be of no engine."""
    if saved.kind == "profile":
        return _profile(saved.result, bundle)
    assert engine is not None
    return {"compare": _compare, "bench": _bench}[saved.kind](saved.result, bundle, engine)


def render(template: str, values: Mapping[str, Any]) -> Markup:
    """A template with its values, as markup."""
    return Markup(templates().get_template(template).render(values))


def _compare(result: dict[str, Any], bundle: str, engine: EngineRecord) -> dict[str, Any]:
    steps, bisect = result["steps"], result["bisect"]
    is_own = result["reference"] == "graph" and not result["weights"]
    return {
        "result": result,
        "worst": scientific(max(over_gate(row) for row in steps)),
        "stale": is_own and not engine.parity,
        "chart": Markup(curves(charts_of(result))),
        "steps": [
            (row["step"], "", *map(scientific, _errors(row)), _cosine(row["cosine"]))
            for row in steps
        ],
        "calls": [
            (row["call"], row["value"], *map(scientific, _errors(row)[:3]))
            for row in (bisect["calls"] if bisect else ())
        ],
        "repeated": compare_command(bundle, engine, result),
    }


def _errors(row: Row) -> tuple[float | None, ...]:
    return row["error"], row["floor"], row["gate"], row.get("drift")


def _cosine(value: float | None) -> str:
    return scientific(None if value is None else max(0.0, 1 - value))


def _bench(result: dict[str, Any], bundle: str, engine: EngineRecord) -> dict[str, Any]:
    lines = sorted(result["arms"], key=lambda line: line["median"])
    return {
        "result": result,
        "peak": count(result["peak"], "FLOP/s"),
        "flops": count(result["flops_per_forward"], "FLOPs"),
        "floor": seconds(result["floor_seconds"]),
        "chart": Markup(bars(lines, result["floor_seconds"])),
        "arms": [
            (
                line["arm"],
                line["attention"] or "-",
                *map(seconds, (line["median"], line["min"], line["max"])),
                share(line["percent_of_floor"] / 100),
                seconds(line["cold_start"]["first_step"]),
                count(line["device_bytes"] or line["peak_bytes"], "B"),
                scientific(line.get("difference")),
            )
            for line in lines
        ],
        "repeated": bench_command(bundle, engine, result),
    }


def _profile(result: dict[str, Any], bundle: str) -> dict[str, Any]:
    gpu, waits, rates = result["gpu"], result["waits"], result["rates"]
    launches = f", GPU busy {share(gpu['busy'])}, {number(gpu['launches'])} launches" if gpu else ""
    roofs = [count(rates["bytes"], "B/s")]
    roofs += [count(rates["flops"], "FLOP/s")] if rates["flops"] else []
    return {
        "result": result,
        "step": seconds(result["seconds_per_step"]),
        "busy": launches,
        "waits": f"The host waits {number(waits['for_gpu'] + waits['reads'])} times",
        "kinds": [(row["kind"], "", *_times(row)) for row in result["kinds"] if row["seconds"]],
        "lines": [
            (row["line"] or "unknown", row["cause"], number(row["count"]), seconds(row["seconds"]))
            for row in waits["lines"][:_MOST_LINES]
        ],
        "chart": Markup(roofline(result["largest"])),
        "roofs": " and ".join(roofs),
        "largest": [
            (place, row["name"], row["kind"], *_times(row))
            for place, row in enumerate(result["largest"], 1)
        ],
        "repeated": profile_command(bundle, result),
    }


def _times(row: Row) -> Sequence[str]:
    """Time, share, count, floor, and how near the time is to it."""
    floor = row["floor_seconds"]
    near = share(floor / row["seconds"]) if floor and row["seconds"] else "-"
    return seconds(row["seconds"]), share(row["share"]), number(row["count"]), seconds(floor), near
