"""Bars and the roofline of a report, as SVGs that follow the page's colours and width."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10
from typing import Any

_WIDTH = 720  # of a chart, in its own pixels
_ROW, _NAME, _LABEL = 30, 120, 150
_HEIGHT, _MARGIN = 380, 56
_MICRO = 1e-6
Row = Mapping[str, Any]


def bars(lines: Sequence[Row], least: float) -> str:
    """A bar for each arm's median time, with its spread, and the floor as a line."""
    most = max([line["max"] for line in lines] + [least]) or 1.0
    scale = (_WIDTH - _NAME - _LABEL) / most
    rows = "".join(_bar(line, 8 + _ROW * i, scale) for i, line in enumerate(lines))
    x, height = _NAME + least * scale, 8 + _ROW * len(lines)
    mark = f'<path class="mark" d="M{x:.1f} 4V{height}"/>'
    words = f'<text x="{x:.1f}" y="{height + 14}" text-anchor="middle">floor</text>'
    return _svg("Time of a forward", height + 20, rows + mark + words)


def _bar(line: Row, y: int, scale: float) -> str:
    end, kind = _NAME + line["median"] * scale, "own" if line["engine"] else "other"
    low, high = (_NAME + line[name] * scale for name in ("min", "max"))
    label = f"{1e3 * line['median']:.4g} ms, {line['percent_of_floor']:.3g} %"
    return (
        f'<text x="{_NAME - 8}" y="{y + 15}" text-anchor="end">{escape(str(line["arm"]))}</text>'
        f'<rect class="{kind}" x="{_NAME}" y="{y}" width="{end - _NAME:.1f}" height="20" rx="2"/>'
        f'<path class="mark thin" d="M{low:.1f} {y + 10}H{high:.1f}"/>'
        f'<text x="{high + 8:.1f}" y="{y + 15}">{escape(label)}</text>'
    )


def roofline(rows: Sequence[Row]) -> str:
    """The time of each kernel against the least that its FLOPs or bytes allow, both logarithmic.

    A kernel on the line runs at the roof, one above it takes longer: the Roofline model of
    Williams, Waterman and Patterson (2009), with time in place of FLOP/s. Empty without a floor.
    """
    known = {n: row for n, row in enumerate(rows, 1) if row["floor_seconds"] and row["seconds"]}
    if not known:
        return ""
    times = [t for row in known.values() for t in (row["seconds"], row["floor_seconds"])]
    low = floor(log10(min(times)))
    axes = _Axes(low, max(ceil(log10(max(times))), low + 1))
    dots = "".join(_dot(axes, number, row) for number, row in known.items())
    middle = _WIDTH / 2
    names = (
        f'<text x="{middle}" y="{_HEIGHT - 10}" text-anchor="middle">floor</text>'
        f'<text x="{_MARGIN}" y="20">time in a step</text>'
    )
    return _svg("Time of each kernel against its floor", _HEIGHT, _grid(axes) + dots + names)


@dataclass(frozen=True)
class _Axes:
    """The same powers of ten of a second, low to high, across and up."""

    low: int
    high: int

    def across(self, seconds: float) -> float:
        return _MARGIN + self._part(seconds) * (_WIDTH - 2 * _MARGIN)

    def up(self, seconds: float) -> float:
        return _HEIGHT - _MARGIN - self._part(seconds) * (_HEIGHT - 2 * _MARGIN)

    def _part(self, seconds: float) -> float:
        return (log10(seconds) - self.low) / (self.high - self.low)


def _grid(axes: _Axes) -> str:
    """A name for each power of ten on both axes, and the roof: where time and floor are equal."""
    least, most = 10.0**axes.low, 10.0**axes.high
    parts = [
        f'<path class="mark" d="M{axes.across(least):.1f} {axes.up(least):.1f}'
        f'L{axes.across(most):.1f} {axes.up(most):.1f}"/>'
    ]
    for power in range(axes.low, axes.high + 1):
        x, y, name = axes.across(10.0**power), axes.up(10.0**power), _named(10.0**power)
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 34}" text-anchor="middle">{name}</text>')
        parts.append(f'<text x="{_MARGIN - 8}" y="{y + 4:.1f}" text-anchor="end">{name}</text>')
        parts.append(f'<path class="grid" d="M{_MARGIN} {y:.1f}H{_WIDTH - _MARGIN}"/>')
    return "".join(parts)


def _dot(axes: _Axes, number: int, row: Row) -> str:
    x, y = axes.across(row["floor_seconds"]), axes.up(row["seconds"])
    kind = "flops" if row["flops"] is not None else "bytes"
    return (
        f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="5">'
        f"<title>{escape(str(row['name']))}</title></circle>"
        f'<text x="{x + 8:.1f}" y="{y - 6:.1f}">{number}</text>'
    )


def _named(seconds: float) -> str:
    """A power of ten of a second in its unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", _MICRO)):
        if seconds >= 0.999 * size:
            return f"{seconds / size:g} {unit}"
    return f"{seconds / 1e-9:g} ns"


def _svg(title: str, height: float, content: str) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {height}" role="img">'
        f"<title>{escape(title)}</title>{content}</svg>"
    )
