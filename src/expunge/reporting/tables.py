"""The scorecard as a table for the terminal and for Markdown: range and good direction with each row."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expunge.evaluation.score_files import SCORES
from expunge.evaluation.scorecard import KIND_NAMES, Cells, Scorecard
from expunge.terminal import plain_console

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_WIDE = 240
LOW, HIGH, EVEN = "low", "high", "0.5"
_WORDS = ("measure", "range", "good", "attack")
_TOTALS = (
    ("task aggregate", "task_aggregate", "0-1", HIGH),
    ("MIA AUC", "mia_auc", "0-1", EVEN),
    ("MIA score", "mia_score", "0-1", HIGH),
    ("utility (guessing: 0.25)", "utility", "0-1", HIGH),
    ("final score", "final_score", "0-1", HIGH),
)


def table_console() -> Console:
    """A console for tables. What is no terminal wraps nothing: there a table must not be cut."""
    console = plain_console()
    if not console.is_terminal:
        console.width = _WIDE
    return console


def table_of(
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    left: Collection[str] = (),
) -> Table:
    """A rich table; the columns of words are `left`, numbers stand at the right."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column, heading in enumerate(header):
        # On a narrow terminal a heading may break at its spaces; a number is never cut.
        widest = max((len(row[column]) for row in rows), default=0)
        if heading in left:
            table.add_column(heading, overflow="fold")
        else:
            table.add_column(heading, justify="right", min_width=widest, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def label_of(run: str, taken: Mapping[str, object]) -> str:
    """What the column of a run directory or a scores.json is called, unlike those that are `taken`."""
    path = Path(run)
    name = path.parent.name if path.suffix == ".json" and path.name == SCORES else path.stem
    label = name or run
    number = 2
    while label in taken:
        label = f"{name} ({number})"
        number += 1
    return label


def scorecard_rows(cards: Mapping[str, Scorecard]) -> list[list[str]]:
    """One list a measure: its name, range, good direction and each card's value."""
    rows = []
    for split, direction in (("forget", LOW), ("retain", HIGH)):
        tasks = sorted({task for card in cards.values() for task in _side(card, split)})
        for task in tasks:
            for name in KIND_NAMES.values():
                values = [_side(card, split).get(task, {}).get(name) for card in cards.values()]
                if any(value is not None for value in values):
                    label = f"{split} {task} {name}"
                    rows.append([label, "0-1", direction, *map(number, values)])
    for label, attribute, span, direction in _TOTALS:
        values = [getattr(card, attribute) for card in cards.values()]
        rows.append([label, span, direction, *map(number, values)])
    return rows


def scorecard_table(cards: Mapping[str, Scorecard], title: str) -> Table:
    """The same as a rich table."""
    rows = scorecard_rows(cards)
    table = table_of(title, ["measure", "range", "good", *cards], (), left=_WORDS)
    previous = None
    for row in rows:
        group = row[0].split()[0] if row[0].startswith(("forget", "retain")) else "total"
        if previous not in (None, group):
            table.add_section()
        previous = group
        table.add_row(*row)
    return table


def audit_rows(request: Mapping[str, Any]) -> list[list[str]]:
    """One list an attack of a request in audit.json: shares extracted, and the recovered share."""
    rows = []
    for attack in request["attacks"].values():
        cells = []
        for name in ("target", "unlearned", "oracle"):
            share = attack["models"].get(name, {}).get("extracted")
            cells.append("-" if share is None else f"{share['value']:.2f}")
        recovered = attack["recovered"]
        told = "-" if recovered is None else f"{recovered['value']:.2f}"
        if recovered is not None and recovered["low"] is not None:
            told += f" ({recovered['low']:.2f} to {recovered['high']:.2f})"
        rows.append(
            [attack["title"], *cells, told, "yes" if attack["power"]["has_power"] else "no"]
        )
    return rows


def audit_table(request: Mapping[str, Any], title: str) -> Table:
    """The same as a rich table."""
    header = ["attack", "target", "unlearned", "oracle", "recovered share", "power"]
    return table_of(title, header, audit_rows(request), left=_WORDS)


def markdown_table(cards: Mapping[str, Scorecard]) -> str:
    """The same in Markdown, for docs."""
    return markdown(["measure", "range", "good", *cards], scorecard_rows(cards))


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of plain cells."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def number(value: float | None) -> str:
    """Three decimals; a dash for what was not measured."""
    return "-" if value is None else f"{value:.3f}"


def _side(card: Scorecard, split: str) -> Cells:
    return card.forget if split == "forget" else card.retain
