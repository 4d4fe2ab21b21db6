"""`expunge evaluate`: a model's scorecard."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from expunge.cli.console import progress_on_stderr
from expunge.cli.options import parse, take_flag
from expunge.evaluation.measuring import MeasureInputs, measure
from expunge.evaluation.outcomes import of_scores
from expunge.evaluation.scorecard import Scorecard
from expunge.evaluation.sentences import scores_sentence
from expunge.reporting.tables import scorecard_table, table_console
from expunge.terminal import speaks

_RECALLED = (
    "forget", "retain", "nonmembers", "mmlu", "columns", "joiner", "long_rows",
)  # fmt: skip


@dataclass(frozen=True)
class Evaluate(MeasureInputs):
    """expunge evaluate MODEL --forget F --retain R [--nonmembers N] [--mmlu DIR] [--output FILE]

    Measures regurgitation, knowledge, membership inference and utility by the protocol of
    SemEval-2025 Task 4. Prints a table, or JSON with --json. --quiet shows no progress.
    """

    json: bool = False
    """Print JSON instead of the table."""


def main(arguments: Sequence[str]) -> int:
    """Parses, measures, prints."""
    arguments, quiet = take_flag(list(arguments), "--quiet")
    settings = parse(Evaluate, arguments, "expunge evaluate", recalls=_RECALLED)
    with progress_on_stderr(quiet=quiet) as progress:
        card = measure(settings, progress.phase, progress.message)
    if speaks():
        _show(card, settings)
    return 0


def _show(card: Scorecard, settings: Evaluate) -> None:
    if settings.json:
        sys.stdout.write(json.dumps(card.to_json(), indent=2) + "\n")
        return
    console = table_console()
    console.print(
        scorecard_table({Path(settings.model).name: card}, f"Scorecard of {settings.model}")
    )
    for finding in of_scores(card):
        console.print(scores_sentence(finding))
