"""Bars are as long as times, and a kernel stands on the roofline where it is as fast as it may."""

import re

import pytest

from tests.exporter.report.saved_figures import BENCH, PROFILE, kernel
from wanexport.exporter.report.charts import bars, roofline
from wanexport.exporter.report.figures import count, scientific, seconds, share


def test_bars_are_as_long_as_the_medians() -> None:
    drawn = bars(BENCH["arms"], BENCH["floor_seconds"])
    widths = [
        float(width) for width in re.findall(r'<rect class="\w+" [^>]*width="([\d.]+)"', drawn)
    ]
    assert widths[0] / widths[1] == pytest.approx(0.06 / 0.03, rel=1e-2)
    (start,) = {float(x) for x in re.findall(r'<rect [^>]*? x="([\d.]+)"', drawn)}
    (floor,) = re.findall(r'<path class="mark" d="M([\d.]+) ', drawn)
    assert (float(floor) - start) / widths[1] == pytest.approx(0.015 / 0.03, rel=1e-2)
    assert re.findall(r'<rect class="(\w+)"', drawn) == ["other", "own"]


def points(drawn: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', drawn)]


def test_a_kernel_at_its_floor_stands_on_the_line_and_a_slower_one_above() -> None:
    drawn = roofline(PROFILE["largest"])
    numbers = re.findall(r'<path class="mark" d="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)"', drawn)
    ((x0, y0, x1, y1),) = (tuple(map(float, row)) for row in numbers)
    (right, slow) = points(drawn)  # the third has no floor

    def line(x: float) -> float:
        return y0 + (x - x0) / (x1 - x0) * (y1 - y0)

    decade = (y0 - y1) / 2  # from 0.1 ms to 10 ms
    assert right[1] == pytest.approx(line(right[0]), abs=0.2)
    assert line(slow[0]) - slow[1] == pytest.approx(decade, abs=0.2)  # ten times its floor
    assert drawn.count('class="flops"') == drawn.count('class="bytes"') == 1


def test_without_a_floor_there_is_no_roofline() -> None:
    assert roofline([kernel("unknown", 1e-3, None)]) == ""
    assert len(points(roofline([kernel("one", 1e-3, 1e-3)]))) == 1


def test_figures_are_short() -> None:
    assert [seconds(t) for t in (2.5, 0.0412, 3e-5, 4e-8, None)] == [
        "2.5 s", "41.2 ms", "30 us", "0.04 us", "-",
    ]  # fmt: skip
    assert [count(n, "B") for n in (23_589_440, 12, None)] == ["23.6 MB", "12 B", "-"]
    assert [scientific(e) for e in (6.2e-7, 0.082, None)] == ["6.2e-07", "0.082", "-"]
    assert share(0.456) == "45.6 %"
