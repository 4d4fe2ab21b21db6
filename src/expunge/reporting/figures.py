"""Figures as inline SVG: pure functions of numbers.

Plain SVG is what prints sharply, takes its colours from the page (light, dark, paper) and weighs a few
kilobytes; a plotting library with its script in the page weighs megabytes and needs the script to run.
Every figure has a title and a description for screen readers. Shapes tell apart what colours do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from markupsafe import Markup

_WIDTH = 680.0
_LEFT, _RIGHT = 62.0, 16.0
_MOST_POINTS = 300
_LONGEST = 28
"""Characters of a name beside a figure."""
_LOG_FROM = 50.0
"""Largest over smallest value from which an axis of positive values is logarithmic."""
_SHAPES = {
    "oracle": "M0-6.5L6.5 5H-6.5Z",
    "destroyed": "M0-6L6 0L0 6L-6 0Z",
    "pruned": "M0 6.5L6.5-5H-6.5Z",
    "failed": "M-4.5-4.5L4.5 4.5M-4.5 4.5L4.5-4.5",
}
"""Paths about the mark's place."""


@dataclass(frozen=True)
class Mark:
    """One model's value on a strip."""

    role: str
    """target, unlearned or oracle."""
    value: float


@dataclass(frozen=True)
class Line:
    """One course of values over steps or layers, or marks that no line joins."""

    name: str
    style: str
    """Its class in the page's style sheet; of marks also their shape."""
    points: Sequence[tuple[float, float | None]]
    marks: bool = False
    """Whether every point is a mark of its own."""
    stepped: bool = False
    """Whether a value holds until the next."""
    said: Sequence[str] = ()
    """What the pointer is told of each mark."""


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
    levels: Sequence[tuple[str, float]] = ()
    """Named values that a line crosses the panel at."""
    height: float = 104.0


@dataclass(frozen=True)
class Compared:
    """One row of a comparison: each model's share, and the interval of the unlearned one's; or a bar."""

    name: str
    marks: Sequence[Mark] = ()
    low: float | None = None
    high: float | None = None
    bar: float | None = None
    said: str = ""
    """What the pointer is told of the bar."""


def strip(marks: Sequence[Mark], description: str, low: float | None, high: float | None) -> Markup:
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
    for mark in marks:
        _mark(svg, mark.role, x(mark.value), y)
    return _markup(svg)


def curves(
    panels: Sequence[Panel],
    across: str,
    title: str,
    description: str,
    span: tuple[float, float] | None = None,
) -> Markup:
    """Panels under each other over one axis; values beyond 300 points are means of neighbours."""
    xs = [point[0] for panel in panels for line in panel.lines for point in line.points]
    first, last = span or ((min(xs), max(xs)) if xs else (0.0, 1.0))
    if first == last:
        first, last = first - 0.5, last + 0.5
    tops, base = [], -14.0
    for panel in panels:
        tops.append(base + 40 + 18 * (not _fits(panel)))
        base = tops[-1] + panel.height
    svg = _figure("curves", _WIDTH, base + 52, title, description)
    x = _scale(first, last, _LEFT, _WIDTH - _RIGHT)
    for panel, top in zip(panels, tops, strict=True):
        _panel(svg, panel, x, top)
    whole = span is None and all(value == int(value) for value in xs)
    _foot(svg, x, base, _ticks(first, last, whole=whole, count=8), across, _LEFT)
    return _markup(svg)


def comparison(rows: Sequence[Compared], across: str, title: str, description: str) -> Markup:
    """A row each: every model's mark and the interval about the unlearned one, or a bar from 0.

    The axis goes from 0 to 1, or as far as bars do.
    """
    left, step, top = 190.0, 24.0, 8.0
    base = top + step * len(rows)
    svg = _figure("comparison", _WIDTH, base + 40, title, description)
    bars = [row.bar for row in rows if row.bar is not None]
    low, high = min([0.0, *bars]), 1.1 * max(bars, default=0.0)
    x = _scale(low, high if high > low else 1.0, left, _WIDTH - _RIGHT)
    for index, row in enumerate(rows):
        y = top + step * (index + 0.5)
        name = row.name if len(row.name) <= _LONGEST else row.name[: _LONGEST - 1] + "…"
        _text(svg, left - 14, y + 4, name, "label", "end")
        _line(svg, left, y, _WIDTH - _RIGHT, y, "grid")
        if row.low is not None and row.high is not None:
            _line(svg, x(row.low), y, x(row.high), y, "interval")
        for mark in row.marks:
            _mark(svg, mark.role, x(mark.value), y)
        if row.bar is not None:
            begin, end = sorted((x(0.0), x(row.bar)))
            _bar(svg, begin, y - 7, end - begin, 14.0, row.said)
            _text(svg, end + 6, y + 4, _short(row.bar), "tick halo", "start")
    _line(svg, left, base, _WIDTH - _RIGHT, base, "axis")
    _foot(svg, x, base, _ticks(low, high or 1.0, whole=False, count=5), across, left)
    return _markup(svg)


def bars(values: Sequence[tuple[int, float]], count: int, title: str, description: str) -> Markup:
    """A bar for each of `count` layers; a layer without a value is unchanged and has none."""
    top, height = 16.0, 120.0
    base = top + height
    svg = _figure("bars", _WIDTH, base + 40, title, description)
    most = max((value for _, value in values), default=0.0) or 1.0
    slot = (_WIDTH - _LEFT - _RIGHT) / max(1, count)
    for tick in _ticks(0.0, most, whole=False, count=4):
        y = base - height * tick / most
        _line(svg, _LEFT, y, _WIDTH - _RIGHT, y, "grid")
        _text(svg, _LEFT - 7, y + 4, f"{100 * tick:g}%", "tick", "end")
    for layer, value in values:
        bar = height * value / most
        _bar(svg, _LEFT + slot * (layer + 0.15), base - bar, slot * 0.7, bar)
    _line(svg, _LEFT, base, _WIDTH - _RIGHT, base, "axis")
    every = max(1, math.ceil(count / 24))
    for layer in range(0, count, every):
        _text(svg, _LEFT + slot * (layer + 0.5), base + 16, str(layer), "tick", "middle")
    _text(svg, (_LEFT + _WIDTH - _RIGHT) / 2, base + 34, "decoder layer", "label", "middle")
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
    drawn = [(line, list(line.points) if line.marks else thinned(line.points)) for line in panel.lines]
    values = [value for _, points in drawn for _, value in points if value is not None]
    logarithmic = not panel.unit and is_logarithmic(values)
    scaled = [math.log10(value) for value in values] if logarithmic else values
    low, high = (min(scaled), max(scaled)) if scaled else (0.0, 1.0)
    if panel.unit:
        low, high = min(0.0, low), max(1.0, high)
    if low == high:
        low, high = low - 0.5, high + 0.5
    base = top + panel.height
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
    for number, (name, level) in enumerate(panel.levels):
        _line(svg, _LEFT, y(level), _WIDTH - _RIGHT, y(level), "chosen")
        # At different places, for levels can be near to each other; never above the panel.
        beside = y(level) + (-4 if y(level) - top > 14 else 13)
        _text(svg, _LEFT + 8 + 60 * number, beside, name, "tick halo", "start")
    if panel.marked is not None:
        _line(svg, x(panel.marked), top, x(panel.marked), base, "chosen")
    for line, points in drawn:
        if line.marks:
            said = line.said or [line.name] * len(points)
            for (at, value), words in zip(points, said, strict=True):
                if value is not None:
                    _mark(svg, line.style, x(at), y(value), words)
            continue
        path, pen = [], "M"
        for at, value in points:
            if value is None:
                pen = "M"
                continue
            path.append(f"H{_n(x(at))}" * (line.stepped and pen == "L"))
            path.append(f"{pen}{_n(x(at))} {_n(y(value))}")
            pen = "L"
        if path:
            ET.SubElement(svg, "path", {"class": f"course {line.style}", "d": "".join(path)})
        if len(points) <= 40 and not line.stepped:
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
        if line.marks:
            _mark(svg, line.style, legend + 14, at)
        else:
            course = {"class": f"course {line.style}", "d": f"M{_n(legend)} {_n(at)}h20"}
            ET.SubElement(svg, "path", course)
            if not line.stepped:
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


def _bar(svg: ET.Element, x: float, y: float, width: float, height: float, said: str = "") -> None:
    place = {"x": _n(x), "y": _n(y), "width": _n(width), "height": _n(height)}
    bar = ET.SubElement(svg, "rect", {"class": "bar", **place})
    if said:
        ET.SubElement(bar, "title").text = said


def _mark(svg: ET.Element, kind: str, x: float, y: float, said: str = "") -> None:
    """Target a hollow square, other models and trials by `_SHAPES`, the rest discs."""
    style = {"class": f"mark {kind}"}
    if kind == "target":
        size = {"x": _n(x - 5.5), "y": _n(y - 5.5), "width": "11", "height": "11"}
        mark = ET.SubElement(svg, "rect", {**style, **size})
    elif kind in _SHAPES:
        place = {"transform": f"translate({_n(x)} {_n(y)})", "d": _SHAPES[kind]}
        mark = ET.SubElement(svg, "path", {**style, **place})
    else:
        place = {"cx": _n(x), "cy": _n(y), "r": "5"}
        mark = ET.SubElement(svg, "circle", {**style, **place})
    if said:
        ET.SubElement(mark, "title").text = said


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
