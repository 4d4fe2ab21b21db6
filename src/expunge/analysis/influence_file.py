"""influence.json: what was found of each row, by id, without its text, and what a run takes of it."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from expunge.analysis.overlap import Overlap
from expunge.analysis.row_gradients import Known
from expunge.data.rows import RowSet
from expunge.errors import InputError

FORMAT = "expunge influence 1"
_LEAST = 10
"""Never-seen rows of a kind that a threshold needs."""
_MOST_AT_RISK = 0.9
"""Rows from this quantile of those whose loss would rise are taken most often."""


@dataclass(frozen=True)
class Threshold:
    """From where on a row of one kind counts as gone: both must hold."""

    answer_loss: float
    """Its answer's loss is this much or more, nats a token."""
    recall: float
    """Its recall is this much or less."""
    source: str
    """What it was taken from: non-members, or guessing."""


@dataclass(frozen=True)
class MeasuredRow:
    """What is measured of every row."""

    id: str
    task: str
    kind: str
    tokens: int
    """Counted tokens."""
    loss: float
    """Nats a token."""
    answer_loss: float
    """The same of the answer."""
    recall: float
    """Share of the answer before its first wrong token, teacher-forced."""


@dataclass(frozen=True)
class ForgetRow(MeasuredRow):
    """One row to remove."""

    self_influence: float
    """Predicted rise of its own loss without it, nats a token."""
    gone: bool
    """Whether the model no longer knows it: its answer is no likelier than a never-seen one."""


@dataclass(frozen=True)
class RetainRow(MeasuredRow):
    """One row to keep."""

    collateral: float
    """Predicted rise of its loss without the forget set, nats a token; negative: it falls."""


@dataclass(frozen=True)
class Influence:
    """Everything that was found; ids and numbers."""

    model: str
    model_sha256: Mapping[str, str]
    data_hmac_sha256: Mapping[str, str]
    """By set, keyed with the user's secret."""
    settings: Mapping[str, Any]
    """Every option that a number depends on."""
    curvature: Mapping[str, Any]
    """Maps, parameters, tokens, the Fisher's mean, the damping, residuals of conjugate gradients."""
    thresholds: Mapping[str, Threshold]
    """By kind."""
    forget: Sequence[ForgetRow]
    retain: Sequence[RetainRow]
    overlaps: Sequence[Overlap]
    expunge: str
    """Version."""

    def to_json(self) -> dict[str, Any]:
        """The file's content; the names that overlaps share are text and left out."""
        plain = asdict(self)
        plain["overlaps"] = [
            {key: value for key, value in overlap.items() if key != "subjects"}
            for overlap in plain["overlaps"]
        ]
        return {"format": FORMAT, **plain}


@dataclass(frozen=True)
class RowsAtRisk:
    """What a run takes from an influence.json."""

    collateral: Mapping[str, float]
    """By id of the retain row, nats a token."""
    gone: frozenset[str]
    """Ids of forget rows."""
    model_sha256: Mapping[str, str]
    sha256: str
    """Of the file."""


def thresholds_of(nonmembers: Sequence[tuple[str, Known]], vocabulary: int) -> dict[str, Threshold]:
    """By kind: the medians of non-members, or of guessing if there are fewer than ten.

    `nonmembers` are kinds with what the model knows of each row.
    """
    found = {}
    for kind in ("sc", "qa"):
        rows = [known for other, known in nonmembers if other == kind]
        if len(rows) >= _LEAST:
            found[kind] = Threshold(
                statistics.median(row.answer_loss for row in rows),
                statistics.median(row.recall for row in rows),
                f"medians of {len(rows)} non-members",
            )
        else:
            found[kind] = Threshold(math.log(vocabulary), 0.0, "guessing, log(vocabulary)")
    return found


def is_gone(known: Known, threshold: Threshold) -> bool:
    """Whether the model knows a row no better than one it never saw."""
    return known.answer_loss >= threshold.answer_loss and known.recall <= threshold.recall


def sampling_weights(collateral: Mapping[str, float], factor: float) -> dict[str, float]:
    """How often each retain row is taken, by id, where one that is not at risk is taken once.

    1 + (factor - 1) * min(1, max(0, C) / c), with C a row's collateral and c the 90% quantile of those
    that are positive, so that neither its unit nor a single row decides.
    """
    positive = sorted(value for value in collateral.values() if value > 0)
    if not positive:
        return dict.fromkeys(collateral, 1.0)
    top = positive[math.ceil(_MOST_AT_RISK * len(positive)) - 1]
    return {row: 1 + (factor - 1) * min(1.0, max(0.0, value) / top) for row, value in collateral.items()}


def influence_text(influence: Influence) -> str:
    """What the file holds."""
    return json.dumps(influence.to_json(), indent=1, allow_nan=False) + "\n"


def is_influence(text: str) -> bool:
    """Whether a file holds an influence.json. Raises what is no JSON of its form."""
    return bool(json.loads(text)["format"] == FORMAT)


def read_influence(path: Path) -> RowsAtRisk:
    """Raises InputError for what `influence_text` did not give."""
    mend = "write one with expunge analyze influence"
    try:
        raw = path.read_bytes()
    except OSError:
        raise InputError(f"--influence {path}: cannot be read; {mend}") from None
    try:
        values: Any = json.loads(raw)
        if values["format"] != FORMAT:
            raise InputError(f"--influence {path}: is not of the format {FORMAT!r}; {mend}")
        collateral = {str(row["id"]): float(row["collateral"]) for row in values["retain"]}
        gone = frozenset(str(row["id"]) for row in values["forget"] if row["gone"])
        hashes = {str(key): str(value) for key, value in values["model_sha256"].items()}
    except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RecursionError):
        raise InputError(f"--influence {path}: is not an influence.json; {mend}") from None
    if not all(map(math.isfinite, collateral.values())):
        raise InputError(f"--influence {path}: holds a collateral that is not finite; {mend}")
    return RowsAtRisk(collateral, gone, hashes, hashlib.sha256(raw).hexdigest())


def check_same_rows(path: str, rows: RowsAtRisk, forget: RowSet, retain: RowSet) -> None:
    """Raises InputError where a retain row has no entry or a gone one is no forget row."""
    missing = [row.id for row in retain if row.id not in rows.collateral]
    if missing:
        raise InputError(
            f"--influence {path}: has no entry for {len(missing)} of the retain rows, first"
            f" {missing[0]!r}; run expunge analyze influence on the same rows"
        )
    unknown = sorted(rows.gone - {row.id for row in forget})
    if unknown:
        raise InputError(
            f"--influence {path}: marks {len(unknown)} rows as gone that are not in the forget set,"
            f" first {unknown[0]!r}; run expunge analyze influence on the same rows"
        )
