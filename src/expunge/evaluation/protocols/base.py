"""What a protocol beside SemEval's is: how its material is read and measured, and its scores.

A protocol is one file that ends in a `Protocol`; `catalog` lists it and `inputs` has its options.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from expunge.errors import InputError, RunError
from expunge.evaluation.score_values import read_mapping, read_score

if TYPE_CHECKING:
    from expunge.data.formats import Role
    from expunge.data.rows import RowSet
    from expunge.data.tokenization import TextPolicy
    from expunge.evaluation.passes import Passes
    from expunge.evaluation.protocols.inputs import ProtocolInputs
    from expunge.models.loading import CheckedModel

SEMEVAL = "semeval"
"""The default protocol, of a score file that names none."""


@dataclass(frozen=True)
class Measure:
    """How one score is shown."""

    title: str
    good: str
    """low, high, or the number that is best."""
    low: float = 0.0
    """The least it can be."""
    high: float = 1.0
    form: str = ".3f"

    @property
    def range(self) -> str:
        """From the least to the most that it can be."""
        return f"{self.low:g}{' to ' if self.low < 0 else '-'}{self.high:g}"


@dataclass(frozen=True)
class ProtocolScores:
    """All scores of one model by one protocol; what was not measured is None and never guessed."""

    protocol: str
    scores: Mapping[str, float | None]
    """By the names of the protocol's measures."""
    rows: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Numbers by row id that another model's measurement is compared with, by what they are."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Counts behind the scores, dtype and form of the text."""
    records: Sequence[Mapping[str, Any]] = field(default_factory=tuple, repr=False)
    """One entry a row, with what was generated; a file of their own."""

    def to_json(self) -> dict[str, Any]:
        """The contents of scores.json."""
        return {name: value for name, value in vars(self).items() if name != "records"}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], measures: Mapping[str, Measure]) -> ProtocolScores:
        """Reads what `to_json` wrote.

        Raises KeyError for a file that is something else and InputError that names a value which is no
        score.
        """
        scores = read_mapping("scores", values["scores"])
        return cls(
            protocol=values["protocol"],
            scores={
                name: read_score(name, scores.get(name), measure.low, measure.high)
                for name, measure in measures.items()
            },
            rows={
                name: _numbers(name, of_rows)
                for name, of_rows in read_mapping("rows", values["rows"]).items()
            },
            details=read_mapping("details", values["details"]),
        )


@dataclass(frozen=True)
class Protocol:
    """How a benchmark measures."""

    name: str
    measures: Mapping[str, Measure]
    """In the order of the table."""
    read: Callable[[ProtocolInputs, CheckedModel, Sequence[TextPolicy]], Any]
    """Material with the fields `forget` and `retain`, checked against the model in each form. Raises
    InputError before weights are loaded."""
    measure: Callable[[Any, Passes], ProtocolScores]


def named_after(name: str, rows: RowSet, role: Role) -> RowSet:
    """The rows, of which those that their file gives no id are NAME-1 on: a role has several files."""
    own = [
        replace(row, id=f"{name}-{n}") if row.id == f"{role}-{n}" else row
        for n, row in enumerate(rows, 1)
    ]
    return replace(rows, rows=tuple(own))


def check_finite(values: Mapping[str, float]) -> None:
    """Raises RunError where a number of a row, by its id, is none."""
    if wrong := [row for row, value in values.items() if not math.isfinite(value)]:
        raise RunError(
            f"row {wrong[0]!r}: the model's loss is no number ({len(wrong)} such rows); measure another"
            " checkpoint, or with --dtype float32"
        )


def _numbers(place: str, values: object) -> dict[str, float]:
    found: dict[str, float] = {}
    for row, value in read_mapping(place, values).items():
        number = read_score(f"{place} of row {row!r}", value, -math.inf, math.inf)
        if number is None or not math.isfinite(number):
            raise InputError(f"{place} of row {row!r} is no finite number; measure it again")
        found[row] = number
    return found
