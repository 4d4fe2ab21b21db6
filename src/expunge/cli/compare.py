"""`expunge compare`: the scorecards of several runs side by side."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from expunge.cli.options import Printed, parse, print_json
from expunge.errors import InputError
from expunge.evaluation.outcomes import of_scores
from expunge.evaluation.score_files import check_one_form, read_scores
from expunge.evaluation.scorecard import Scorecard
from expunge.evaluation.sentences import scores_sentence
from expunge.reporting.tables import label_of, markdown_table, scorecard_table, table_console


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
        if not self.runs:
            raise InputError("compare: no run given; name at least one directory or scores.json")
        if self.json and self.markdown:
            raise InputError("--json: excludes --markdown; choose one")


def main(arguments: Sequence[str]) -> int:
    """Parses, reads, prints."""
    settings = parse(Compare, arguments, "expunge compare", positional="runs")
    cards = {}
    if settings.original is not None:
        cards["target"] = read_scores(settings.original)
    if settings.oracle is not None:
        cards["oracle"] = read_scores(settings.oracle)
    for run in settings.runs:
        cards[label_of(run, cards)] = read_scores(run)
    check_one_form(cards)
    show(cards, as_json=settings.json, as_markdown=settings.markdown)
    return 0


def show(cards: dict[str, Scorecard], *, as_json: bool = False, as_markdown: bool = False) -> None:
    """Prints the comparison to standard output, with what the scores say in words."""
    if as_json:
        print_json({name: card.to_json() for name, card in cards.items()})
        return
    if as_markdown:
        sys.stdout.write(markdown_table(cards))
        return
    console = table_console()
    console.print(scorecard_table(cards, "Scorecards"))
    for name, card in cards.items():
        if name in ("target", "oracle"):
            continue
        for finding in of_scores(card, cards.get("target")):
            console.print(f"{name}: {scores_sentence(finding)}")
