"""What `bench` makes of its measurements: a row for each arm, the saved result, and the plot."""

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from wanexport.exporter.reference.parity import relative_l2
from wanexport.runtime.bundle.durable import (
    durable_file,
    own_folder,
    remove_partials,
    write_durably,
)
from wanexport.runtime.errors import WanExportError, explain, needing_extra

_REFERENCE = "graph"  # the arm that the others' velocities are compared with, where it ran


def row(figures: Mapping[str, Any], flops: int, floor: float) -> dict[str, Any]:
    """An arm's line, times in seconds, from what its process measured.

    flops are those of a forward, floor is the time that they take at the machine's peak.
    """
    median = statistics.median(figures["seconds"])
    return {
        "median": median,
        "min": min(figures["seconds"]),
        "max": max(figures["seconds"]),
        "tflops": flops / median / 1e12,
        "percent_of_floor": 100 * floor / median,
        "first_to_steady": figures["cold_start"]["first_call"] / median,
        "compile_seconds": None,
        "host_syncs": None,
        "gpu_busy": None,
        **figures,
    }


def add_differences(result: dict[str, Any], velocities: Mapping[str, np.ndarray]) -> None:
    """Give each arm the relative L2 distance of its velocity from that of one of them."""
    if not velocities:
        return
    reference = _REFERENCE if _REFERENCE in velocities else next(iter(velocities))
    result["compared_with"] = reference
    for line in result["arms"]:
        line["difference"] = relative_l2(velocities[line["arm"]], velocities[reference])


def save(result: dict[str, Any], folder: Path, *, is_own: bool = False) -> str | None:
    """Write the result and its plot; what could not be written is returned, in one line.

    is_own says that the folder is the bundle's, which may be no link.
    """
    name = f"bench-{result['engine'].replace('/', '-')}"
    try:
        if is_own:
            own_folder(folder.parent, folder.name)
        folder.mkdir(parents=True, exist_ok=True)
        remove_partials(folder)
        write_durably(folder / f"{name}.json", (json.dumps(result, indent=1) + "\n").encode())
    except (OSError, WanExportError) as error:  # the figures stand without their file
        return f"the report was not saved: {explain(error)}"
    try:
        draw(result, folder / f"{name}.png")
    except WanExportError as error:
        return str(error)
    except OSError as error:
        return f"the plot was not saved: {explain(error)}"
    return None


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Write a bar for each arm: its median forward, from least to most, beside the floor.

    The bars of engines have a colour. Raises WanExportError without Matplotlib, and OSError when
    the file cannot be written.
    """
    with needing_extra("bench", "the plot"):
        import matplotlib  # noqa: F401
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    arms = result["arms"][::-1]  # bars are drawn upwards
    medians = [1e3 * line["median"] for line in arms]
    spread = [
        [1e3 * (line["median"] - line["min"]) for line in arms],
        [1e3 * (line["max"] - line["median"]) for line in arms],
    ]
    colours = ["tab:orange" if line["engine"] else "tab:gray" for line in arms]
    figure = Figure(figsize=(8, 1.5 + 0.4 * len(arms)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.barh([line["arm"] for line in arms], medians, xerr=spread, color=colours, capsize=3)
    for height, line in enumerate(arms):
        label = f"  {1e3 * line['median']:.4g} ms, {line['percent_of_floor']:.3g} %"
        axes.text(1e3 * line["max"], height, label, va="center")
    axes.set_xlim(0, 1.3e3 * max(line["max"] for line in arms))  # room for the last label
    axes.axvline(1e3 * result["floor_seconds"], color="black", linestyle="--")
    axes.set_xlabel("ms a forward: median, least, most, and % of the floor, which is dashed")
    axes.set_title(f"{result['model']}, {result['engine']}, {result['machine']}", fontsize=10)
    with durable_file(path) as file:
        figure.savefig(file, dpi=150, format="png")
