"""Curves on a logarithmic axis as a self-contained SVG, which is read in light and in dark mode."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, isfinite, log10
from typing import TypeGuard

Curve = Sequence[float | None]  # a value for each place; None and 0 leave a gap

_WIDTH, _HEIGHT = 720, 300  # of one chart, in pixels of the SVG
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 56, 44  # its margins
_MOST_TICKS = 12
_DASHES = ("", "7 4", "2 3", "10 3 2 3", "1 5", "5 2 1 2")
_LIGHT = ("#b3261e", "#0b57d0", "#5f6368", "#0d652d", "#8430ce", "#a15c00")
_DARK = ("#ff8a80", "#8ab4f8", "#bdc1c6", "#81c995", "#d7aefb", "#fdd663")


@dataclass(frozen=True)
class Chart:
    """Curves over the same places: a name for each place, and a curve for each name."""

    title: str
    across: str
    places: Sequence[str]
    series: Mapping[str, Curve]


def curves(charts: Sequence[Chart]) -> str:
    """An SVG with the charts below one another; text and axes have the colour of the page."""
    height = _HEIGHT * len(charts)
    drawn = "".join(
        f'<g transform="translate(0 {_HEIGHT * i})">{_chart(chart)}</g>\n'
        for i, chart in enumerate(charts)
    )
    title = escape("; ".join(chart.title for chart in charts))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'class="curves" font-family="system-ui, sans-serif" font-size="12">\n'
        f"<title>{title}</title>\n<style>{_style()}</style>\n{drawn}</svg>\n"
    )


def _style() -> str:
    """The colours: the page's own where the SVG is part of one, else the reader's choice."""
    own = ".curves{color-scheme:light dark;color:CanvasText}"
    shapes = ".curves text{fill:currentColor}.curves .axis{stroke:currentColor;stroke-opacity:.25}"
    dark = "".join(f".curves .c{i}{{--c:{colour}}}" for i, colour in enumerate(_DARK))
    light = "".join(f".curves .c{i}{{--c:{colour}}}" for i, colour in enumerate(_LIGHT))
    lines = ".curves .line{fill:none;stroke:var(--c);stroke-width:2}.curves circle{fill:var(--c)}"
    return f"{own}{shapes}{light}{lines}@media(prefers-color-scheme:dark){{{dark}}}"


def _chart(chart: Chart) -> str:
    """Title, legend, axes and curves of one chart."""
    values = [v for curve in chart.series.values() for v in curve if _is_drawn(v)]
    low = floor(log10(min(values))) if values else -1
    high = max(ceil(log10(max(values))) if values else 0, low + 1)
    axes = _decades(low, high) + _names(chart)
    lines = "".join(
        _curve(number, curve, low, high) for number, curve in enumerate(chart.series.values())
    )
    return f'<text x="8" y="18" font-weight="600">{escape(chart.title)}</text>{_legend(chart)}' + (
        axes + lines if values else _text(_WIDTH / 2, _HEIGHT / 2, "nothing to show", "middle")
    )


def _legend(chart: Chart) -> str:
    width = (_WIDTH - _LEFT - _RIGHT) / max(len(chart.series), 1)
    parts = []
    for number, name in enumerate(chart.series):
        x = _LEFT + number * width
        parts.append(_line(number, f"M{x:.1f} 34H{x + 26:.1f}") + _text(x + 32, 38, name))
    return "".join(parts)


def _decades(low: int, high: int) -> str:
    """A line for each power of ten, every so many with its name."""
    step = ceil((high - low) / 8)
    parts = []
    for power in range(low, high + 1, step):
        y = _height(10.0**power, low, high)
        parts.append(f'<path class="axis" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(_text(_LEFT - 8, y + 4, f"1e{power}", "end"))
    return "".join(parts)


def _names(chart: Chart) -> str:
    """The names of the places, every so many, and what they are."""
    step = ceil(len(chart.places) / _MOST_TICKS) or 1
    parts = [
        _text(_across(i, len(chart.places)), _HEIGHT - _BOTTOM + 16, name, "middle")
        for i, name in enumerate(chart.places)
        if i % step == 0
    ]
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    return "".join(parts) + _text(middle, _HEIGHT - 10, chart.across, "middle")


def _curve(number: int, curve: Curve, low: int, high: int) -> str:
    """A line through the values, broken where there is none, and a dot at each."""
    path, dots, pen = "", "", "M"
    colour = number % len(_LIGHT)
    for i, value in enumerate(curve):
        if not _is_drawn(value):
            pen = "M"
            continue
        x, y = _across(i, len(curve)), _height(value, low, high)
        path, pen = f"{path}{pen}{x:.1f} {y:.1f}", "L"
        dots += f'<circle class="c{colour}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>'
    return (_line(number, path) if path else "") + dots


def _line(number: int, path: str) -> str:
    dash = _DASHES[number % len(_DASHES)]
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<path class="line c{number % len(_LIGHT)}"{dashes} d="{path}"/>'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _is_drawn(value: float | None) -> TypeGuard[float]:
    return value is not None and isfinite(value) and value > 0


def _across(index: int, count: int) -> float:
    room = _WIDTH - _LEFT - _RIGHT - 24
    return _LEFT + 12 + (room * index / (count - 1) if count > 1 else room / 2)


def _height(value: float, low: int, high: int) -> float:
    room = _HEIGHT - _TOP - _BOTTOM
    return _TOP + room * (high - log10(value)) / (high - low)
