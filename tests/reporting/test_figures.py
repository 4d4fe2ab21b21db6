"""Figures: what is drawn where, against plain arithmetic."""

from __future__ import annotations

import itertools
import math
import re
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expunge.reporting import figures
from expunge.reporting.figures import Compared, Line, Panel

Points = list[tuple[float, float | None]]


def drawn(svg: object) -> ET.Element:
    return ET.fromstring(str(svg))


def path_of(svg: ET.Element, style: str) -> list[tuple[float, float]]:
    """The places of a line's points; the sample in the legend is left out."""
    (path,) = (
        each
        for each in svg.iter("path")
        if each.attrib["class"] == f"course {style}" and "h" not in each.attrib["d"]
    )
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([-\d.]+) ([-\d.]+)", path.attrib["d"])]


def test_marks_of_a_strip_stand_at_their_values() -> None:
    values = {"target": 1.0, "oracle": 0.0, "unlearned": 0.25}
    svg = drawn(figures.strip(values, "told", 0.125, 0.5))
    disc = svg.find("circle")
    square = svg.find("rect")
    assert disc is not None
    assert square is not None
    left, right = (9.0, 201.0)
    assert float(disc.attrib["cx"]) == pytest.approx(left + 0.25 * (right - left))
    assert float(square.attrib["x"]) + 5.5 == pytest.approx(right)
    (interval,) = (each for each in svg.iter("line") if each.attrib["class"] == "interval")
    assert float(interval.attrib["x1"]) == pytest.approx(left + 0.125 * (right - left))
    assert float(interval.attrib["x2"]) == pytest.approx(left + 0.5 * (right - left))
    assert svg.attrib["aria-label"] == "told"


def test_a_share_beyond_the_strip_is_drawn_at_its_end() -> None:
    svg = drawn(figures.strip({"unlearned": -0.3}, "told", None, None))
    disc = svg.find("circle")
    assert disc is not None
    assert float(disc.attrib["cx"]) == 9.0


def test_a_line_is_straight_where_values_are() -> None:
    points: Points = [(step, 3.0 * step + 1) for step in range(1, 11)]
    svg = drawn(figures.curves([Panel("x", [Line("x", "forget", points)])], "step", "t", "d"))
    places = path_of(svg, "forget")
    assert len(places) == 10
    (x0, y0), (x1, y1) = places[0], places[-1]
    for x, y in places:
        share = (x - x0) / (x1 - x0)
        assert y == pytest.approx(y0 + share * (y1 - y0), abs=0.02)
    assert y1 < y0  # greater values stand higher


def test_positive_values_far_apart_get_a_logarithmic_axis() -> None:
    points: Points = [(step, 10.0**step) for step in range(5)]
    svg = drawn(figures.curves([Panel("x", [Line("x", "forget", points)])], "step", "t", "d"))
    heights = [y for _, y in path_of(svg, "forget")]
    gaps = [a - b for a, b in itertools.pairwise(heights)]
    assert gaps == pytest.approx([gaps[0]] * 4, abs=0.05)
    assert any("log scale" in (each.text or "") for each in svg.iter("text"))
    assert not figures.is_logarithmic([-1.0, 1000.0])
    assert not figures.is_logarithmic([0.0, 1000.0])
    assert not figures.is_logarithmic([])


def test_a_gap_in_the_values_is_a_gap_in_the_line() -> None:
    points: Points = [(1, 1.0), (2, 2.0), (3, None), (4, 3.0)]
    svg = drawn(figures.curves([Panel("x", [Line("x", "forget", points)])], "step", "t", "d"))
    path = svg.find("path")
    assert path is not None
    assert path.attrib["d"].count("M") == 2
    assert len(path_of(svg, "forget")) == 3


@pytest.mark.parametrize(
    "points",
    [[], [(1.0, None)], [(1.0, 0.0)], [(5.0, 2.0), (5.0, 2.0)], [(1.0, 1e-300), (2.0, 1e300)]],
)
def test_the_least_and_the_oddest_can_be_drawn(points: Points) -> None:
    for unit in (False, True):
        panel = Panel("x", [Line("x", "forget", points)], unit=unit, marked=1.0, marked_as="m")
        text = str(figures.curves([panel], "step", "t", "d"))
        drawn(text)
        assert "nan" not in text
        assert "inf" not in text


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=900),
    st.integers(1, 300),
)
def test_thinning_keeps_the_mean_and_the_order(values: list[float], most: int) -> None:
    points: Points = [(step, value) for step, value in enumerate(values)]
    found = figures.thinned(points, most)
    assert len(found) == min(most, len(points))
    steps = [step for step, _ in found]
    assert steps == sorted(steps)
    kept = [value for _, value in found if value is not None]
    tolerance = 1e-6 * max(1.0, *map(abs, values))
    assert min(values) - tolerance <= min(kept) <= max(kept) <= max(values) + tolerance
    if len(points) % most == 0:  # parts of one size: the mean of means is the mean
        mean = math.fsum(values) / len(values)
        assert math.fsum(kept) / len(kept) == pytest.approx(mean, abs=tolerance)


def test_comparisons_stand_at_their_values() -> None:
    shares = {"oracle": 0.0, "target": 1.0, "unlearned": 0.5}
    rows = [Compared("a", shares, 0.25, 0.75), Compared("b <", {"unlearned": 1.0}, None, None)]
    svg = drawn(figures.comparison(rows, "x", "t", "d"))
    half, whole = (float(each.attrib["cx"]) for each in svg.iter("circle"))
    (interval,) = (each for each in svg.iter("line") if each.attrib["class"] == "interval")
    low, high = float(interval.attrib["x1"]), float(interval.attrib["x2"])
    assert half == pytest.approx((low + high) / 2, abs=0.02)
    assert whole - half == pytest.approx(high - low, abs=0.05)
    (target,) = svg.iter("rect")
    assert float(target.attrib["x"]) + 5.5 == pytest.approx(whole, abs=0.02)
    assert "b <" in [each.text for each in svg.iter("text")]
