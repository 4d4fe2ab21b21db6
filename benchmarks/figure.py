"""Forgetting against retention as a figure: SVG for a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

COLOURS = (
    "#4e79a7", "#f28e2b", "#e15759", "#76b7b2", "#59a14f", "#edc948", "#b07aa1", "#ff9da7",
    "#9c755f", "#5b5b5b", "#1f9e89", "#7f3c8d",
)  # fmt: skip
MARKED = ("target", "oracle")
X_AXIS = "retained (mean of the retain parts)"
Y_AXIS = "forgotten (1 - mean of the forget parts)"


@dataclass(frozen=True)
class Point:
    """A model: what it kept and what it forgot, from 0 to 1, with standard deviations over seeds."""

    name: str
    kept: float
    forgotten: float
    kept_spread: float
    forgotten_spread: float


def write_figure(points: Sequence[Point], title: str, directory: Path) -> None:
    """Writes figure.svg."""
    (directory / "figure.svg").write_text(svg(points, title), encoding="utf-8")


def coloured(points: Sequence[Point]) -> list[tuple[Point, str]]:
    """A colour for each point: black for the target and the oracle."""
    methods = [point.name for point in points if point.name not in MARKED]
    return [
        (point, "#000000" if point.name in MARKED else COLOURS[methods.index(point.name) % 12])
        for point in points
    ]


def svg(points: Sequence[Point], title: str) -> str:
    """The figure: bars of one standard deviation, the names beside."""
    left, top, side = 60, 40, 400

    def at(kept: float, forgotten: float) -> tuple[float, float]:
        return left + side * kept, top + side * (1 - forgotten)

    parts = [f'<text x="{left}" y="22" font-size="15">{escape(title)}</text>']
    for tick in range(6):
        (x, bottom), (begin, y) = at(tick / 5, 0), at(0, tick / 5)
        parts += [
            f'<path d="M{x:.1f} {top}V{bottom}M{begin} {y:.1f}H{left + side}" stroke="#ddd"/>',
            f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{tick / 5:.1f}</text>',
            f'<text x="{begin - 8}" y="{y + 4:.1f}" text-anchor="end">{tick / 5:.1f}</text>',
        ]
    middle = top + side / 2
    turned = f'transform="rotate(-90 18 {middle})"'
    parts += [
        f'<text x="{left + side / 2}" y="{top + side + 40}" text-anchor="middle">{X_AXIS}</text>',
        f'<text x="18" y="{middle}" text-anchor="middle" {turned}>{Y_AXIS}</text>',
    ]
    for line, (point, colour) in enumerate(coloured(points)):
        x, y = at(point.kept, point.forgotten)
        w, h = side * point.kept_spread, side * point.forgotten_spread
        key = top + 10 + 22 * line
        bars = f"M{x - w:.1f} {y:.1f}H{x + w:.1f}M{x:.1f} {y - h:.1f}V{y + h:.1f}"
        parts += [
            f'<path d="{bars}" stroke="{colour}" stroke-width="1.5"/>',
            _mark(point.name, colour, x, y),
            _mark(point.name, colour, left + side + 26, key),
            f'<text x="{left + side + 40}" y="{key + 4}">{escape(point.name)}</text>',
        ]
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 500" font-family="sans-serif"'
    ground = '<rect width="720" height="500" fill="#fff"/>'
    return f'{head} font-size="13">\n{ground}\n' + "\n".join(parts) + "\n</svg>\n"


def _mark(name: str, colour: str, x: float, y: float) -> str:
    """A square for the target, a diamond for the oracle, a circle for a method."""
    if name not in MARKED:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="{colour}"/>'
    turn = 0 if name == "target" else 45
    place = f'x="{x - 6:.1f}" y="{y - 6:.1f}" width="12" height="12" fill="{colour}"'
    return f'<rect {place} transform="rotate({turn} {x:.1f} {y:.1f})"/>'
