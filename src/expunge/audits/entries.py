"""What every entry of audit.json has, and what it hands to the verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from expunge.audits.base import Attack, Case, Found, ModelName
from expunge.audits.estimates import Resamples
from expunge.audits.verdict import Evidence
from expunge.data.rows import Row, document_of

DIGITS = 6
"""Of a row's score: further ones are rounding, which may change with the machine."""
Models = Mapping[ModelName, Found]


@dataclass(frozen=True)
class Summary:
    """An attack's entry in audit.json, and what the verdict takes from it."""

    entry: dict[str, Any]
    evidence: Sequence[Evidence]


def opening(
    attack: Attack,
    models: Iterable[ModelName] = (),
    outcome: Callable[[ModelName, str], dict[str, Any]] = lambda _model, _name: {},
    rows: Iterable[Row] = (),
) -> dict[str, Any]:
    """An entry with its rows, before it is known what it claims."""
    return {
        "title": attack.title,
        "kind": attack.kind,
        "reference": attack.reference,
        "power": {"has_power": True, "why": None},
        "sentence": "",
        "recovered": None,
        "models": {},
        "rows": [
            {
                "id": row.id,
                "document": document_of(row),
                "outcomes": {model: outcome(model, row.id) for model in models},
            }
            for row in rows
        ],
    }


def able(entry: dict[str, Any], said: str, evidence: Sequence[Evidence]) -> Summary:
    """The entry with what it says in words."""
    entry["sentence"] = f"{entry['title']}: {said}"
    return Summary(entry, evidence)


def powerless(entry: dict[str, Any], why: str, beside: str = "") -> Summary:
    """The entry of an attack that claims nothing, and why."""
    entry["power"] = {"has_power": False, "why": why}
    return able(entry, f"no power here, so no claim: {why}{beside}.", [])


def resamples_of(rows: Sequence[Row], case: Case, of: int | None = None) -> Resamples:
    """Resamples of the rows' documents; `of` is how many documents they were drawn from."""
    documents = [document_of(row) for row in rows]
    return Resamples(documents, case.budget.resamples, case.seed, of)
