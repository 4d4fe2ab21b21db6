"""What a sweep makes large: the final score, or several parts of the scorecard at once.

Every objective lies in [0, 1] and higher is better.

    final        mean of task aggregate, MIA score and utility, as the scorecard has it
    aggregate    harmonic mean of everything that `forgetting` and `retention` are means of
    forgetting   harmonic mean of 1 - regurgitation and 1 - knowledge of the forget set, over tasks
    retention    harmonic mean of regurgitation and knowledge of the retain set, over tasks
    mia          MIA score, 1 - 2 |AUC - 0.5|
    utility      accuracy on the questions of --mmlu
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from expunge.errors import InputError
from expunge.evaluation.scorecard import Cells, Scorecard

Objective = Literal["final", "aggregate", "forgetting", "retention", "mia", "utility"]
Part = Literal["retain", "nonmembers", "mmlu"]
NEEDS: Mapping[Objective, tuple[Part, ...]] = {
    "final": ("retain", "nonmembers", "mmlu"),
    "aggregate": ("retain",),
    "forgetting": (),
    "retention": ("retain",),
    "mia": ("nonmembers",),
    "utility": ("mmlu",),
}
_PARTS = {
    "retain": "task aggregate (--retain)",
    "nonmembers": "MIA score (--calibration)",
    "mmlu": "utility (--mmlu)",
}


def check_objectives(objectives: Sequence[Objective], given: Collection[Part]) -> None:
    """Raises InputError for objectives that cannot be measured with what is given, or repeat."""
    if not objectives:
        raise InputError(f"--objectives: none given; choose from {', '.join(NEEDS)}")
    for objective in objectives:
        if objectives.count(objective) > 1:
            raise InputError(f"--objectives {objective}: is given twice; name each once")
        missing = [_PARTS[material] for material in NEEDS[objective] if material not in given]
        if missing:
            measured = [name for name, needs in NEEDS.items() if set(needs) <= set(given)]
            raise InputError(
                f"--objectives {objective}: not measured without {' and '.join(missing)}; give it, or"
                f" choose from what is measured: {', '.join(measured)}"
            )


def objective_value(objective: Objective, card: Scorecard) -> float | None:
    """The objective's value, or None where its parts were not measured."""
    values = {
        "final": card.final_score,
        "aggregate": card.task_aggregate,
        "forgetting": _harmonic([1 - value for value in _measured(card.forget)]),
        "retention": _harmonic(_measured(card.retain)),
        "mia": card.mia_score,
        "utility": card.utility,
    }
    return values[objective]


def _measured(cells: Cells) -> list[float]:
    return [value for cell in cells.values() for value in cell.values() if value is not None]


def _harmonic(values: Sequence[float]) -> float | None:
    return statistics.harmonic_mean([max(0.0, value) for value in values]) if values else None
