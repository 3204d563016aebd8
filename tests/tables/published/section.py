"""What a section of docs/published_optimisations.md is: its rows, and the script that fills them.

A script yields its cells one by one, so that what was measured before a time limit is kept.
"""

import argparse
import json
import tempfile
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Place:
    """Where a script measures: `cpu` or `cuda`, and a folder for models that sections share."""

    device: str
    folder: Path


Cells = Iterable[tuple[str, str]]  # label of a row, and what was measured


@dataclass(frozen=True)
class Section:
    """Rows by their label, each with the figure that was published, and what measures them."""

    name: str
    rows: dict[str, str]
    measure: Callable[[Place], Cells]

    def cells(self, place: Place) -> Cells:
        """The cells as they are measured. Raises ValueError for one of a row that is not there."""
        for label, cell in self.measure(place):
            if label not in self.rows or "|" in cell:
                raise ValueError(f"section {self.name} has no row for {label!r}: {cell!r}")
            yield label, cell


def each(*steps: Callable[[], Cells]) -> Cells:
    """The cells of steps. One that fails leaves the others, and its error is raised at the end."""
    errors = []
    for step in steps:
        try:
            yield from step()
        except Exception as error:
            traceback.print_exc()
            errors.append(error)
    if errors:
        raise errors[0]


def main(section: Section, words: Sequence[str] | None = None) -> None:
    """Measure one section, and print a line for each cell: `label: cell`, or JSON."""
    parser = argparse.ArgumentParser(prog=f"python -m tests.tables.published.{section.name}")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--folder", type=Path, help="for models and bundles; a temporary one")
    parser.add_argument("--json", action="store_true", help="each cell as a list of two")
    given = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as scratch:
        place = Place(given.device, given.folder or Path(scratch))
        for label, cell in section.cells(place):
            print(json.dumps([label, cell]) if given.json else f"{label}: {cell}", flush=True)
