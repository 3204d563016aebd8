"""The curves of a comparison are a self-contained SVG, whose heights are logarithms."""

import re
from itertools import pairwise
from math import inf, nan
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from wanexport.exporter.cli.display_compare import _telling
from wanexport.exporter.compare.curves import Chart, curves
from wanexport.exporter.compare.plot import charts_of, save_plot

SVG = "{http://www.w3.org/2000/svg}"


def dots(chart: Chart) -> list[tuple[float, float]]:
    root = ElementTree.fromstring(curves([chart]))
    return [(float(d.attrib["cx"]), float(d.attrib["cy"])) for d in root.iter(f"{SVG}circle")]


def chart(*values: float | None) -> Chart:
    return Chart("title", "step", [str(i) for i in range(len(values))], {"error": values})


def test_a_power_of_ten_is_as_high_wherever_it_is() -> None:
    points = dots(chart(1e-6, 1e-5, 1e-4, 1e-2))
    heights = [y for _, y in points]
    steps = [a - b for a, b in pairwise(heights)]
    assert steps == pytest.approx([steps[0], steps[0], 2 * steps[0]], abs=0.2)
    assert steps[0] > 0  # up, in an SVG whose y goes down
    across = [x for x, _ in points]
    assert across == pytest.approx(
        [across[0] + i * (across[1] - across[0]) for i in range(4)], abs=0.2
    )


@pytest.mark.parametrize("missing", [None, 0.0, nan, inf])
def test_what_has_no_logarithm_leaves_a_gap(missing: float | None) -> None:
    drawn = curves([chart(1e-3, 1e-3, missing, 1e-3)])
    assert drawn.count("<circle") == 3
    (path,) = re.findall(r'class="line c0" d="(M[^"H]*)"', drawn)
    assert path.count("M") == 2


def test_nothing_to_show_is_said() -> None:
    assert "nothing to show" in curves([chart(None, 0.0)])


def test_it_stands_alone_and_reads_in_light_and_dark() -> None:
    drawn = curves([chart(1e-3), Chart("<b>&", "call", ["0"], {"floor": [1e-4]})])
    root = ElementTree.fromstring(drawn)
    assert root.attrib["viewBox"].split()[3] == "600"
    assert "&lt;b&gt;&amp;" in drawn and "<b>" not in drawn
    assert "currentColor" in drawn and "prefers-color-scheme:dark" in drawn
    assert re.findall(r'https?://[^"]*', drawn) == ["http://www.w3.org/2000/svg"]
    assert not re.search(r"url\(|@import|<script|href", drawn)


def test_forty_places_have_names_that_do_not_touch() -> None:
    drawn = curves([chart(*[1e-3] * 40)])
    assert 10 <= drawn.count('y="272.0"') <= 14


def test_a_result_has_a_chart_of_steps_and_one_of_calls(tmp_path: Path) -> None:
    step = {"step": 0, "error": 1e-3, "floor": None, "gate": 1e-2, "drift": 2e-3}
    call = {"call": "block 7", "error": 1e-4, "floor": None, "gate": 1e-3, "carried": 1e-4}
    result = {"engine": "e", "reference": "graph", "steps": [step], "bisect": None}
    (only,) = charts_of(result)
    assert list(only.series) == ["error", "gate", "drift"]
    calls = {"step": 0, "calls": [{**call, "carried_floor": None}]}
    _, second = charts_of({**result, "bisect": calls})
    assert second.places == ["7"]
    assert list(second.series) == ["error", "gate", "carried"]
    save_plot(tmp_path / "c.svg", {**result, "bisect": calls})
    ElementTree.parse(tmp_path / "c.svg")


def test_of_many_calls_those_that_tell_are_shown() -> None:
    passing: list[dict[str, Any]] = [
        {"passed": True, "error": 1e-6, "gate": 1e-5} for _ in range(42)
    ]
    passing[9]["error"] = 2e-6
    assert _telling(passing) == [0, 1, 9, 40, 41]
    passing[20] = {"passed": False, "error": None, "gate": 1e-5}
    assert _telling(passing) == [0, 1, 19, 20, 21, 22, 40, 41]
    assert _telling(passing[:1]) == [0]
