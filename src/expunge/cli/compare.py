"""`expunge compare`: the scorecards of several runs side by side."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from expunge.cli.options import Printed, parse, print_json
from expunge.errors import InputError
from expunge.evaluation.outcomes import of_scores
from expunge.evaluation.scorecard import Scorecard
from expunge.evaluation.sentences import scores_sentence
from expunge.reporting.comparison import compared
from expunge.reporting.tables import (
    markdown,
    protocol_rows,
    protocol_table,
    scorecard_rows,
    scorecard_table,
    table_console,
)


@dataclass(frozen=True)
class Compare(Printed):
    """expunge compare RUN RUN ... [--original T] [--oracle O] [--json | --markdown]

    Each is a scores.json that `expunge evaluate --output` wrote, or a directory that holds one.
    """

    runs: tuple[str, ...]
    """Runs to compare."""
    original: Annotated[str | None, tyro.conf.arg(aliases=("--target",))] = None
    """Scores of the model before. Warnings are then relative to it."""
    oracle: str | None = None
    """Scores of a model trained without the forget set."""
    markdown: bool = False
    """Print the table in Markdown."""

    def __post_init__(self) -> None:
        if self.json and self.markdown:
            raise InputError("--json: excludes --markdown; choose one")


def main(arguments: Sequence[str]) -> int:
    """Parses, reads, prints."""
    settings = parse(Compare, arguments, "expunge compare", positional="runs")
    protocol, cards = compared(settings.runs, settings.original, settings.oracle)
    if settings.json:
        print_json({label: card.to_json() for label, card in cards.items()})
    elif settings.markdown:
        rows = scorecard_rows(cards) if protocol is None else protocol_rows(protocol, cards)
        sys.stdout.write(markdown(["measure", "range", "good", *cards], rows))
    elif protocol is None:
        show(cards)
    else:
        table_console().print(protocol_table(protocol, cards, f"Scores by {protocol.name}"))
    return 0


def show(cards: Mapping[str, Scorecard]) -> None:
    """Prints scorecards side by side to standard output, with what the scores say in words."""
    console = table_console()
    console.print(scorecard_table(cards, "Scorecards"))
    for name, card in cards.items():
        if name in ("target", "oracle"):
            continue
        for finding in of_scores(card, cards.get("target")):
            console.print(f"{name}: {scores_sentence(finding)}")
