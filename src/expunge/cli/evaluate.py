"""`expunge evaluate`: a model's scorecard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from expunge.cli.console import progress_on_stderr
from expunge.cli.options import Printed, parse, print_json
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
class Evaluate(Printed, MeasureInputs):
    """expunge evaluate MODEL --forget F --retain R [--nonmembers N] [--mmlu DIR]

    Measures regurgitation, knowledge, membership inference and utility by the protocol of
    SemEval-2025 Task 4.

    Examples:
      expunge evaluate out
      expunge evaluate model --forget f.jsonl --retain r.jsonl --output scores.json
      expunge evaluate out --forget f.jsonl --retain r.jsonl --nonmembers n.jsonl
    """


def main(arguments: Sequence[str]) -> int:
    """Parses, measures, prints."""
    settings = parse(Evaluate, arguments, "expunge evaluate", recalls=_RECALLED)
    with progress_on_stderr() as progress:
        card = measure(settings, progress.phase, progress.message)
    if speaks():
        _show(card, settings)
    return 0


def _show(card: Scorecard, settings: Evaluate) -> None:
    if settings.json:
        print_json(card.to_json())
        return
    console = table_console()
    console.print(
        scorecard_table({Path(settings.model).name: card}, f"Scorecard of {settings.model}")
    )
    for finding in of_scores(card):
        console.print(scores_sentence(finding))
