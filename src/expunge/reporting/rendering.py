"""report.json drawn as a page and as a model-card section.

A template can print no number of its own: it names the place in report.json, and the page carries that
place and the exact value with every number that it shows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Undefined
from markupsafe import Markup

from expunge.reporting import figures
from expunge.reporting.figures import Compared, Line, Panel
from expunge.reporting.grids import Grids, at, none, pairs
from expunge.terminal import shown

ABSENT = "not measured"
_BACK = ("oracle", "target", "unlearned")
"""In the order of drawing: the mark that the report is about lies above the others."""
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")
_CANDIDATES = (
    ("forget_accuracy", "forget accuracy", "forget"),
    ("retain_accuracy", "retain accuracy", "retain"),
    ("mia_auc", "MIA AUC", "two"),
)


def page(report: Mapping[str, Any]) -> str:
    """One self-contained HTML page."""
    environment = _environment(html=True)

    def number(pointer: str, form: str = "score") -> Markup:
        value = at(report, pointer)
        if value is None:
            return none(ABSENT)
        told = Markup('<data value="{}" data-at="{}">{}</data>')
        return told.format(repr(value), pointer, written(value, form))

    return environment.get_template("report.html").render(
        report=report,
        n=number,
        tables=Grids(report, number),
        figures=drawings(report),
        style=Markup(environment.get_template("report.css").render()),
    )


def card_section(report: Mapping[str, Any]) -> str:
    """The body of the section in the checkpoint's README.md; it never holds revealed text."""

    def number(pointer: str, form: str = "score") -> Markup:
        value = at(report, pointer)
        return Markup(ABSENT if value is None else written(value, form))

    public = {**report, "revealed": None}
    drawn = _environment(html=False).get_template("card.md").render(report=public, n=number)
    return re.sub(r"\n{3,}", "\n\n", drawn).strip() + "\n"


def written(value: float, form: str) -> str:
    """A number as it is shown: score, percent, count, short, seconds or bytes."""
    return _FORMS[form](value)


def cell(text: object) -> Markup:
    """Text from outside as a piece of Markdown, also in a table, where it stays text."""
    one_line = re.sub(r"\s+", " ", str(text))
    marked = re.sub(r"([\\`*_\[\]#|~!])", r"\\\1", one_line)
    return Markup(marked.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


def public_name(model: str) -> str:
    """A model's name without the folders of the machine that it lay on; a hub id stays whole."""
    return Path(model).name if model.startswith(("/", ".", "~")) or "\\" in model else model


def templates_of(package: str, *, html: bool) -> Environment:
    """A package's templates; what they are given is text, and what is missing is an error."""
    return Environment(
        loader=PackageLoader(package),
        autoescape=True,
        finalize=None if html else _as_text,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _as_text(value: Any) -> Any:
    """For Markdown: what is not marked up by a template stays text."""
    return value if isinstance(value, Markup | Undefined) else cell(value)


@cache
def _environment(*, html: bool) -> Environment:
    environment = templates_of("expunge.reporting", html=html)
    environment.globals |= {
        "absent": ABSENT, "setting": shown, "public_name": public_name,
        "pairs": pairs,
    }  # fmt: skip
    return environment


def drawings(report: Mapping[str, Any]) -> dict[str, Any]:
    """Every figure of the page, from report.json alone; None where there is nothing to draw."""
    audit, training = report["audit"], report["training"]
    kept = (training["chosen_step"], f"kept: step {training['chosen_step']}")
    return {
        "strips": [_strip(measure) for measure in report["measures"]],
        "terms": _terms(training, kept),
        "candidates": _candidates(training, kept),
        "attacks": [] if audit is None else [_attacks(request) for request in audit["requests"]],
    }


def _strip(measure: Mapping[str, Any]) -> Markup | None:
    known = {role: measure["values"][role] for role in _BACK if measure["values"][role] is not None}
    if not known:
        return None
    told = ", ".join(f"{role} {written(value, 'score')}" for role, value in known.items())
    description = f"On a scale from 0 to 1: {told}. Good is {measure['good']}."
    return figures.strip(known, description, measure["low"], measure["high"])


def _terms(training: Mapping[str, Any], kept: tuple[int, str]) -> Markup | None:
    if training["curve"] is None:
        return None
    panels, told = [], []
    for name, course in training["curve"].items():
        if course is None:
            continue
        line = Line(name, name, [(step, value) for step, value in course["drawn"]])
        panels.append(Panel(f"{name} term of the loss", [line], marked=kept[0], marked_as=kept[1]))
        first, last, least, greatest = (
            written(course[key], "short") for key in ("first", "last", "least", "greatest")
        )
        told.append(f"The {name} term goes from {first} to {last}, between {least} and {greatest}.")
    return figures.curves(panels, "step", "Terms of the loss over the steps", " ".join(told))


def _candidates(training: Mapping[str, Any], kept: tuple[int, str]) -> Markup | None:
    """The shares that were measured during the run, the target's at step 0."""
    candidates = training["candidates"]
    if not candidates:
        return None
    target = [] if training["target"] is None else [{**training["target"], "step": 0}]
    measured = [*target, *candidates]
    lines = [
        Line(name, style, [(entry["step"], entry[part]) for entry in measured])
        for part, name, style in _CANDIDATES
        if any(entry[part] is not None for entry in measured)
    ]
    panel = Panel("Measured during the run", lines, unit=True, marked=kept[0], marked_as=kept[1])
    told = f"{len(candidates)} candidates; the table below holds every value. Kept: step {kept[0]}."
    return figures.curves([panel], "step (0: the target)", "Candidates", told)


def _attacks(request: Mapping[str, Any]) -> Markup | None:
    """Before, after and oracle of every attack with power that extracts."""
    rows, told = [], []
    for each in request["attacks"]:
        if each["value"] is None or each["kind"] != "extraction":
            continue
        shares = {role: each["models"][role]["extracted"] for role in _BACK if each["models"][role]}
        after = shares["unlearned"]
        values_of = {role: share["value"] for role, share in shares.items()}
        rows.append(Compared(each["title"], values_of, after["low"], after["high"]))
        values = ", ".join(f"{role} {share['value']:.0%}" for role, share in shares.items())
        told.append(f"{each['title']}: {values}")
    if not rows:
        return None
    title = "Facts that each attack gets, before, after and from the oracle"
    return figures.comparison(rows, "share of the facts", title, f"{'; '.join(told)}.")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _size(count: float) -> str:
    size = float(count)
    for unit in _UNITS[:-1]:
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} {_UNITS[-1]}"


_FORMS: Mapping[str, Callable[[float], str]] = {
    "score": "{:.3f}".format,
    "percent": "{:.1%}".format,
    "count": "{:,}".format,
    "seconds": _duration,
    "bytes": _size,
    "short": lambda value: f"{value:#.4g}".removesuffix("."),
}
