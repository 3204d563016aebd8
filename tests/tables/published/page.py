"""The tables of docs/published_optimisations.md: a row for each label, a column for each device.

A table stands between `<!-- published: SECTION -->` and `<!-- end of published -->`. A run fills
the column of its device; the others keep what they have. The summary is made of the other tables.
"""

import re
from collections.abc import Mapping
from typing import Any

from tests.tables.published import summary
from tests.tables.published.section import Section

COLUMNS = {"cpu": "CPU", "cuda": "GPU"}
_TABLE = re.compile(r"(<!-- published: (\w+) -->\n)(.*?)(<!-- end of published -->)", re.DOTALL)


def table(section: Section, cells: Mapping[str, Mapping[str, str]]) -> str:
    """A section's table; `cells` has those of each column by label. Empty rows are left out."""
    published = any(section.rows.values())
    head = ["", *(["published"] if published else []), *COLUMNS.values()]
    lines = [_line(head), "|---" * len(head) + "|"]
    for label, figure in section.rows.items():
        measured = [cells.get(column, {}).get(label, "") for column in COLUMNS.values()]
        if figure or any(measured):
            lines.append(_line([label, *([figure] if published else []), *measured]))
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return re.sub(r"\|  (?=\|)", "| ", f"| {' | '.join(cells)} |")


def cells_of(text: str) -> dict[str, dict[str, str]]:
    """The cells of a table by column and label, of which the columns of devices are read."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    rows = [row for row in rows if row]
    found: dict[str, dict[str, str]] = {}
    for row in rows[2:]:
        for column, cell in zip(rows[0], row, strict=True):
            if column in COLUMNS.values() and cell:
                found.setdefault(column, {})[row[0]] = cell
    return found


def filled(text: str, sections: Mapping[str, Section], record: Mapping[str, Any]) -> str:
    """A page with a run in it: of each section that the run has, its device's column is new."""
    column = COLUMNS[record["device"]] if record else ""
    tables = {found[2]: cells_of(found[3]) for found in _TABLE.finditer(text)}
    for name, told in record.get("sections", {}).items():
        tables.setdefault(name, {})[column] = told["cells"]
    known = dict(sections)
    if summary.NAME in tables:
        known[summary.NAME] = summary.section(sections)
        tables[summary.NAME] = summary.cells(tables)
    return _TABLE.sub(
        lambda found: f"{found[1]}\n{table(known[found[2]], tables[found[2]])}\n\n{found[4]}", text
    )


def names_in(text: str) -> list[str]:
    """The sections that a page has tables of."""
    return [found[2] for found in _TABLE.finditer(text)]
