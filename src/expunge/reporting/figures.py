"""Figures as inline SVG: pure functions of numbers.

Plain SVG is what prints sharply, takes its colours from the page (light, dark, paper) and weighs a few
kilobytes; a plotting library with its script in the page weighs megabytes and needs the script to run.
Every figure has a title and a description for screen readers. Shapes tell apart what colours do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from markupsafe import Markup

_WIDTH = 680.0
_LEFT, _RIGHT = 62.0, 16.0
_HEIGHT = 104.0
"""Of a panel."""
_MOST_POINTS = 300
_LONGEST = 28
"""Characters of a name beside a figure."""
_LOG_FROM = 50.0
"""Largest over smallest value from which an axis of positive values is logarithmic."""


@dataclass(frozen=True)
class Line:
    """One course of values over steps or layers."""

    name: str
    style: str
    """Its class in the page's style sheet."""
    points: Sequence[tuple[float, float | None]]


@dataclass(frozen=True)
class Panel:
    """Lines over one common axis."""

    title: str
    lines: Sequence[Line]
    unit: bool = False
    """Whether values are shares, drawn from 0 to 1."""
    marked: float | None = None
    """Where the chosen step or layer is."""
    marked_as: str = ""


@dataclass(frozen=True)
class Compared:
    """One row of a comparison: each model's share, and the interval of the unlearned one's."""

    name: str
    shares: Mapping[str, float]
    """By model, the one that lies above the others last."""
    low: float | None
    high: float | None


def strip(
    values: Mapping[str, float], description: str, low: float | None, high: float | None
) -> Markup:
    """A line from 0 to 1 with a mark for each model, and an interval about the unlearned one."""
    width, y = 210.0, 13.0
    x = _scale(0.0, 1.0, 9.0, 201.0)
    svg = _figure("strip", width, 32.0, "", description)
    _line(svg, x(0.0), y, x(1.0), y, "axis")
    for tick in (0.0, 0.5, 1.0):
        _line(svg, x(tick), y - 4, x(tick), y + 4, "axis")
        _text(svg, x(tick), 30, f"{tick:g}", "tick", "middle")
    if low is not None and high is not None:
        _line(svg, x(low), y, x(high), y, "interval")
    for model, value in values.items():
        _mark(svg, model, x(value), y)
    return _markup(svg)


def curves(panels: Sequence[Panel], across: str, title: str, description: str) -> Markup:
    """Panels under each other over one axis; values beyond 300 points are means of neighbours."""
    xs = [point[0] for panel in panels for line in panel.lines for point in line.points]
    first, last = (min(xs), max(xs)) if xs else (0.0, 1.0)
    if first == last:
        first, last = first - 0.5, last + 0.5
    tops, base = [], -14.0
    for panel in panels:
        tops.append(base + 40 + 18 * (not _fits(panel)))
        base = tops[-1] + _HEIGHT
    svg = _figure("curves", _WIDTH, base + 52, title, description)
    x = _scale(first, last, _LEFT, _WIDTH - _RIGHT)
    for panel, top in zip(panels, tops, strict=True):
        _panel(svg, panel, x, top)
    whole = all(value == int(value) for value in xs)
    _foot(svg, x, base, _ticks(first, last, whole=whole, count=8), across, _LEFT)
    return _markup(svg)


def comparison(rows: Sequence[Compared], across: str, title: str, description: str) -> Markup:
    """A row each, from 0 to 1: every model's mark and the interval about the unlearned one."""
    left, step, top = 190.0, 24.0, 8.0
    base = top + step * len(rows)
    svg = _figure("comparison", _WIDTH, base + 40, title, description)
    x = _scale(0.0, 1.0, left, _WIDTH - _RIGHT)
    for index, row in enumerate(rows):
        y = top + step * (index + 0.5)
        name = row.name if len(row.name) <= _LONGEST else row.name[: _LONGEST - 1] + "…"
        _text(svg, left - 14, y + 4, name, "label", "end")
        _line(svg, left, y, _WIDTH - _RIGHT, y, "grid")
        if row.low is not None and row.high is not None:
            _line(svg, x(row.low), y, x(row.high), y, "interval")
        for model, share in row.shares.items():
            _mark(svg, model, x(share), y)
    _line(svg, left, base, _WIDTH - _RIGHT, base, "axis")
    _foot(svg, x, base, _ticks(0.0, 1.0, whole=False, count=5), across, left)
    return _markup(svg)


def thinned(
    points: Sequence[tuple[float, float | None]], most: int = _MOST_POINTS
) -> list[tuple[float, float | None]]:
    """At most `most` points; each of more stands for neighbours: their mean step and mean value."""
    if len(points) <= most:
        return list(points)
    found: list[tuple[float, float | None]] = []
    for index in range(most):
        part = points[len(points) * index // most : len(points) * (index + 1) // most]
        known = [value for _, value in part if value is not None]
        mean = math.fsum(known) / len(known) if known else None
        found.append((math.fsum(at for at, _ in part) / len(part), mean))
    return found


def is_logarithmic(values: Sequence[float]) -> bool:
    """Whether positive values differ so much that an even axis would hide the small ones."""
    return bool(values) and min(values) > 0 and max(values) / min(values) > _LOG_FROM


def _scale(low: float, high: float, begin: float, end: float) -> Callable[[float], float]:
    """Where a value stands; what is beyond an end stands at it."""

    def place(value: float) -> float:
        return begin + (end - begin) * min(1.0, max(0.0, (value - low) / (high - low)))

    return place


def _foot(
    svg: ET.Element,
    x: Callable[[float], float],
    base: float,
    ticks: Sequence[float],
    across: str,
    left: float,
) -> None:
    """The marks of a horizontal axis and what it measures."""
    for tick in ticks:
        _line(svg, x(tick), base, x(tick), base + 4, "axis")
        _text(svg, x(tick), base + 17, f"{tick:g}", "tick", "middle")
    _text(svg, (left + _WIDTH - _RIGHT) / 2, base + 34, across, "label", "middle")


def _legend(panel: Panel) -> float:
    """Width of the names of a panel's lines; nothing where there is one."""
    return sum(7.0 * len(line.name) + 34 for line in panel.lines) if len(panel.lines) > 1 else 0.0


def _fits(panel: Panel) -> bool:
    """Whether a panel's title leaves room for the names of its lines."""
    return 7.5 * len(panel.title) + _legend(panel) < _WIDTH - _LEFT - _RIGHT


def _panel(svg: ET.Element, panel: Panel, x: Callable[[float], float], top: float) -> None:
    drawn = [(line, thinned(line.points)) for line in panel.lines]
    values = [value for _, points in drawn for _, value in points if value is not None]
    logarithmic = not panel.unit and is_logarithmic(values)
    scaled = [math.log10(value) for value in values] if logarithmic else values
    low, high = (min(scaled), max(scaled)) if scaled else (0.0, 1.0)
    if panel.unit:
        low, high = min(0.0, low), max(1.0, high)
    if low == high:
        low, high = low - 0.5, high + 0.5
    base = top + _HEIGHT
    linear = _scale(low, high, base, top)

    def y(value: float) -> float:
        return linear(math.log10(value) if logarithmic else value)

    names = top - 9
    title = panel.title + (" (log scale)" if logarithmic else "")
    _text(svg, _LEFT, names if _fits(panel) else names - 18, title, "label strong", "start")
    if logarithmic:
        powers = range(math.ceil(low), math.floor(high) + 1)
        ticks = [10.0**power for power in powers] or [10**low, 10**high]
        ticks = ticks[:: math.ceil(len(ticks) / 5)]
    else:
        ticks = _ticks(low, high, whole=False, count=4)
    for tick in ticks:
        _line(svg, _LEFT, y(tick), _WIDTH - _RIGHT, y(tick), "grid")
        _text(svg, _LEFT - 7, y(tick) + 4, _short(tick), "tick", "end")
    _line(svg, _LEFT, top, _LEFT, base, "axis")
    _line(svg, _LEFT, base, _WIDTH - _RIGHT, base, "axis")
    if panel.marked is not None:
        _line(svg, x(panel.marked), top, x(panel.marked), base, "chosen")
    for line, points in drawn:
        path, pen = [], "M"
        for at, value in points:
            if value is None:
                pen = "M"
                continue
            path.append(f"{pen}{_n(x(at))} {_n(y(value))}")
            pen = "L"
        if path:
            ET.SubElement(svg, "path", {"class": f"course {line.style}", "d": "".join(path)})
        if len(points) <= 40:
            for at, value in points:
                if value is not None:
                    _dot(svg, line.style, x(at), y(value))
    if panel.marked is not None:
        # Beside the title, or, where the names of the lines stand there, within the panel.
        at_right = x(panel.marked) > _WIDTH * 0.6
        place = x(panel.marked) + (-6 if at_right else 6), names if len(drawn) == 1 else base - 6
        _text(svg, *place, panel.marked_as, "tick halo", "end" if at_right else "start")
    legend = _WIDTH - _RIGHT - _legend(panel)
    for line in panel.lines if len(panel.lines) > 1 else ():
        at = names - 4
        course = {"class": f"course {line.style}", "d": f"M{_n(legend)} {_n(at)}h20"}
        ET.SubElement(svg, "path", course)
        _dot(svg, line.style, legend + 10, at)
        _text(svg, legend + 25, at + 4, line.name, "tick", "start")
        legend += 7.0 * len(line.name) + 34


def _figure(kind: str, width: float, height: float, title: str, description: str) -> ET.Element:
    svg = ET.Element(
        "svg",
        {"class": kind, "viewBox": f"0 0 {_n(width)} {_n(height)}", "role": "img"},
    )
    svg.set("aria-label", f"{title}. {description}" if title else description)
    return svg


def _line(svg: ET.Element, x1: float, y1: float, x2: float, y2: float, style: str) -> None:
    ends = {"x1": _n(x1), "y1": _n(y1), "x2": _n(x2), "y2": _n(y2)}
    ET.SubElement(svg, "line", {"class": style, **ends})


def _text(svg: ET.Element, x: float, y: float, text: str, style: str, anchor: str) -> None:
    place = {"class": style, "x": _n(x), "y": _n(y), "text-anchor": anchor}
    ET.SubElement(svg, "text", place).text = text


def _mark(svg: ET.Element, model: str, x: float, y: float) -> None:
    """The target a hollow square, the oracle a triangle, the unlearned model a disc."""
    style = {"class": f"mark {model}"}
    if model == "target":
        size = {"x": _n(x - 5.5), "y": _n(y - 5.5), "width": "11", "height": "11"}
        ET.SubElement(svg, "rect", {**style, **size})
    elif model == "oracle":
        place = {"transform": f"translate({_n(x)} {_n(y)})", "d": "M0-6.5L6.5 5H-6.5Z"}
        ET.SubElement(svg, "path", {**style, **place})
    else:
        ET.SubElement(svg, "circle", {**style, "cx": _n(x), "cy": _n(y), "r": "5"})


def _dot(svg: ET.Element, style: str, x: float, y: float) -> None:
    ET.SubElement(svg, "circle", {"class": f"dot {style}", "cx": _n(x), "cy": _n(y), "r": "2.6"})


def _ticks(low: float, high: float, *, whole: bool, count: int) -> list[float]:
    """Round values between two, about `count` of them."""
    if not math.isfinite(high - low) or high <= low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    if whole:
        step = max(1.0, float(math.ceil(step)))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _short(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _markup(svg: ET.Element) -> Markup:
    # ElementTree escapes every attribute and text.
    return Markup(ET.tostring(svg, encoding="unicode"))
