"""Tables for the terminal and for Markdown; of scores the good direction stands with each row."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expunge.audits.base import MODELS
from expunge.evaluation.memorisation import MEMORISATION
from expunge.evaluation.score_files import SCORES
from expunge.evaluation.scorecard import KIND_NAMES, Scorecard, Split
from expunge.terminal import plain_console

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from expunge.evaluation.protocols.base import Protocol, ProtocolScores

TOTALS = {
    "task_aggregate": ("task aggregate", "high"),
    "mia_auc": ("MIA AUC", "0.5"),
    "mia_score": ("MIA score", "high"),
    "utility": ("utility (guessing: 0.25)", "high"),
    "final_score": ("final score", "high"),
}
"""By part what it is called, and what is good."""
_SPLITS: Mapping[Split, str] = {"forget": "low", "retain": "high"}
_WIDE = 240
_WORDS = ("measure", "range", "good", "attack")


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


def label_of(run: str, taken: Collection[str]) -> str:
    """What the column of a run directory or a scores.json is called, unlike those that are `taken`."""
    path = Path(run)
    name = path.parent.name if path.suffix == ".json" and path.name == SCORES else path.stem
    label, number = name or run, 2
    while label in taken:
        label, number = f"{name or run} ({number})", number + 1
    return label


def score_rows(cards: Sequence[Scorecard]) -> list[dict[str, Any]]:
    """One entry a measure that any of the cards has, and all totals, with each card's value."""
    rows: list[dict[str, Any]] = []
    for split, good in _SPLITS.items():
        for task in sorted({task for card in cards for task in card.side(split)}):
            for part in KIND_NAMES.values():
                values = [card.side(split).get(task, {}).get(part) for card in cards]
                if any(value is not None for value in values):
                    row: dict[str, Any] = {
                        "split": split,
                        "task": task,
                        "part": part,
                        "title": f"{task} {part}",
                    }
                    rows.append({**row, "good": good, "values": values})
        for part in MEMORISATION:
            values = [card.memorisation.get(split, {}).get(part) for card in cards]
            if any(value is not None for value in values):
                row = {"split": split, "task": None, "part": part, "title": part.replace("_", " ")}
                rows.append({**row, "good": good, "values": values})
    told = [(task, part) for c in cards for task in c.harness for part in c.harness[task]["metrics"]]
    for task, part in sorted(set(told)):
        found = [card.harness.get(task, {}).get("metrics", {}).get(part) for card in cards]
        row = {"split": "harness", "task": task, "part": part, "title": f"{task} {part}"}
        values = [each and each.get("value") for each in found]
        rows.append({**row, "good": next(each["good"] for each in found if each), "values": values})
    for part, (title, good) in TOTALS.items():
        named: dict[str, Any] = {"split": "total", "task": None, "part": part, "title": title}
        rows.append({**named, "good": good, "values": [getattr(card, part) for card in cards]})
    return rows


def measure_name(row: Mapping[str, Any]) -> str:
    """What a measure is called in a table: of one set by its name."""
    return row["title"] if row["split"] == "total" else f"{row['split']} {row['title']}"


def _range(row: Mapping[str, Any]) -> str:
    """From the least to the most; of the harness' metrics only shares are known to have one."""
    shares = ("acc", "exact_match", "f1")
    return "0-1" if row["split"] != "harness" or row["part"].startswith(shares) else "-"


def scorecard_rows(cards: Mapping[str, Scorecard]) -> list[list[str]]:
    """One list a measure: its name, range, good direction and each card's value."""
    return [
        [measure_name(row), _range(row), row["good"], *map(number, row["values"])]
        for row in score_rows(list(cards.values()))
    ]


def scorecard_table(cards: Mapping[str, Scorecard], title: str) -> Table:
    """The same as a rich table."""
    made = table_of(title, ["measure", "range", "good", *cards], (), left=_WORDS)
    split = None
    for row, told in zip(score_rows(list(cards.values())), scorecard_rows(cards), strict=True):
        if split not in (None, row["split"]):
            made.add_section()
        split = row["split"]
        made.add_row(*told)
    return made


def protocol_rows(protocol: Protocol, cards: Mapping[str, ProtocolScores]) -> list[list[str]]:
    """One list a measure of a protocol beside SemEval's: as `scorecard_rows`."""
    rows = []
    for name, measure in protocol.measures.items():
        values = [card.scores[name] for card in cards.values()]
        cells = ["-" if value is None else format(value, measure.form) for value in values]
        rows.append([measure.title, measure.range, measure.good, *cells])
    return rows


def protocol_table(protocol: Protocol, cards: Mapping[str, ProtocolScores], title: str) -> Table:
    """The same as a rich table."""
    header = ["measure", "range", "good", *cards]
    return table_of(title, header, protocol_rows(protocol, cards), left=_WORDS)


def audit_rows(request: Mapping[str, Any]) -> list[list[str]]:
    """One list an attack of a request in audit.json: shares extracted, and the recovered share."""
    rows = []
    for attack in request["attacks"].values():
        cells = []
        for name in MODELS:
            share = attack["models"].get(name, {}).get("extracted")
            cells.append("-" if share is None else f"{share['value']:.2f}")
        recovered = attack["recovered"]
        told = "-" if recovered is None else f"{recovered['value']:.2f}"
        if recovered is not None and recovered["low"] is not None:
            told += f" ({recovered['low']:.2f} to {recovered['high']:.2f})"
        power = "yes" if attack["power"]["has_power"] else "no"
        rows.append([attack["title"], *cells, told, power])
    return rows


def audit_table(request: Mapping[str, Any], title: str) -> Table:
    """The same as a rich table."""
    header = ("attack", *MODELS, "recovered share", "power")
    return table_of(title, header, audit_rows(request), left=_WORDS)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table of plain cells."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def number(value: float | None) -> str:
    """Three decimals; a dash for what was not measured."""
    return "-" if value is None else f"{value:.3f}"
