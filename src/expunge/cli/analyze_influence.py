"""`expunge analyze influence`: which rows a model depends on, and which removal would hurt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from expunge.analysis.influence import InfluenceInputs, analyze_influence
from expunge.analysis.influence_file import Influence
from expunge.cli.console import progress_on_stderr
from expunge.cli.options import Printed, parse, print_json
from expunge.data.rows import RowSet
from expunge.errors import InputError
from expunge.reporting.influence import influence_tables, summary_lines
from expunge.reporting.tables import table_console


@dataclass(frozen=True)
class AnalyzeInfluence(Printed, InfluenceInputs):
    """expunge analyze influence MODEL --forget F [--retain R] [--nonmembers N] [--output influence.json]

    Says how strongly the model depends on each forget row, and how well it knows the row. Predicts
    how much the loss of each retain row would rise without the forget set. Lists retain rows that
    overlap with the forget set.
    """

    top: int = 10
    """Rows that each table shows."""
    reveal: bool = False
    """Show the text of the rows in the tables; files never hold any."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top < 1:
            raise InputError(f"--top {self.top}: must be 1 or more")
        if self.reveal and self.json:
            raise InputError("--reveal: shows text in the tables; leave --json out")


def main(arguments: Sequence[str]) -> int:
    """Parses, analyses, prints."""
    settings = parse(AnalyzeInfluence, arguments, "expunge analyze influence")
    with progress_on_stderr() as progress:
        influence, sets = analyze_influence(settings, progress.phase, progress.message)
    _show(influence, sets, settings)
    return 0


def _show(influence: Influence, sets: Mapping[str, RowSet], settings: AnalyzeInfluence) -> None:
    if settings.json:
        print_json(influence.to_json())
        return
    console = table_console()
    texts = {row.id: row for rows in sets.values() for row in rows} if settings.reveal else None
    for table in influence_tables(influence, settings.top, texts):
        console.print(table)
    for line in summary_lines(influence):
        console.print(line, soft_wrap=True)
