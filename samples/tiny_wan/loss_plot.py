"""Draw the loss curve of a training run.

    python -m samples.tiny_wan.loss_plot FOLDER

reads FOLDER/loss.csv and writes FOLDER/loss.png. It takes Matplotlib.
"""

import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from wanexport.runtime.bundle.durable import write_durably


def loss_plot(losses: Sequence[tuple[int, float]]) -> bytes:
    """A PNG of (step, loss), on a logarithmic scale. Raises ImportError without Matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps, values = zip(*losses, strict=True)
    axes.semilogy(steps, values, color="tab:blue", linewidth=1)
    axes.set_xlabel("step")
    axes.set_ylabel(f"loss, mean of {steps[0]} steps")
    axes.grid(which="both", alpha=0.3)
    png = io.BytesIO()
    figure.savefig(png, dpi=100)
    return png.getvalue()


def main(folder: Path) -> None:
    """Read the curve, and draw it."""
    with (folder / "loss.csv").open(newline="") as file:
        losses = [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]
    write_durably(folder / "loss.png", loss_plot(losses))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
