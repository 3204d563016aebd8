"""The curves of a comparison, saved as an SVG."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wanexport.exporter.compare.curves import Chart, Curve, curves
from wanexport.exporter.compare.output import check_output
from wanexport.runtime.bundle.durable import write_durably

_OF_STEPS = ("error", "floor", "gate", "drift")
_OF_CALLS = {
    "error": "error",
    "floor": "floor",
    "gate": "gate",
    "carried": "carried",
    "carried_floor": "carried floor",
}


def check_plot(path: Path | None, *, overwrite: bool) -> None:
    """Refuse before the work what could not be saved after it. Raises BadRequest."""
    if path is not None:
        check_output(path, "--plot", ".svg", "curves are saved as SVG", overwrite=overwrite)


def save_plot(path: Path, result: Mapping[str, Any]) -> None:
    """Write the curves of a result of `compare`."""
    write_durably(path, curves(charts_of(result)).encode())


def charts_of(result: Mapping[str, Any]) -> list[Chart]:
    """Error, floor, gate and drift by step, and where it was bisected, by call."""
    title = f"{result['engine']} against {result['reference']}"
    steps = result["steps"]
    places = [str(row["step"]) for row in steps]
    charts = [Chart(title, "step", places, _series(steps, dict(zip(_OF_STEPS, _OF_STEPS))))]
    if bisect := result["bisect"]:
        calls = bisect["calls"]
        names = [row["call"].replace("block ", "") for row in calls]
        title = f"the calls of step {bisect['step']}"
        charts.append(Chart(title, "call", names, _series(calls, _OF_CALLS)))
    return charts


def _series(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> dict[str, Curve]:
    """The curves that have a value."""
    series = {shown: [row[name] for row in rows] for name, shown in names.items()}
    return {name: curve for name, curve in series.items() if any(v is not None for v in curve)}
