"""RWKU on a model (arXiv 2406.10890): what probes and neighbours get told, and losses of passages.

Probes stand under the chat template, passages are plain; `evaluation.rwku` has the formulas.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from expunge.data.columns import Kind
from expunge.data.formats import Record, Role, open_source
from expunge.data.rows import Reading, Row, RowSet
from expunge.data.tokenization import Example, TextPolicy, encode_rows, writable
from expunge.errors import InputError
from expunge.evaluation.passes import Passes, record_of
from expunge.evaluation.protocols.base import (
    Measure,
    Protocol,
    ProtocolScores,
    check_finite,
    named_after,
)
from expunge.evaluation.protocols.inputs import ProtocolInputs
from expunge.evaluation.rwku import ANSWER_TOKENS, OPENING, Level, probe, rouge_recall
from expunge.evaluation.scorecard import check_prompts_of
from expunge.models.loading import CheckedModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAME = "rwku"
FORGET = "forget_level2"
"""The part that `--forget` is; every other has an option of its own name."""
ATTACKS = "forget_level3"
PROBES: Mapping[str, tuple[Role, Level]] = {
    "forget_level1": ("forget", 1),
    FORGET: ("forget", 2),
    ATTACKS: ("forget", 3),
    "neighbor_level1": ("retain", 1),
    "neighbor_level2": ("retain", 2),
}
PASSAGES: Mapping[str, Role] = {"mia_forget": "forget", "mia_retain": "retain"}
_LEVELS = {"1": "blanks", "2": "questions", "3": "attacks"}
MEASURES: Mapping[str, Measure] = {
    **{
        part: Measure(
            f"{part.split('_')[0]} level {level} ({_LEVELS[str(level)]})",
            "low" if role == "forget" else "high",
        )
        for part, (role, level) in PROBES.items()
    },
    "mia_forget_loss": Measure("forget passages, loss", "high", high=float("inf")),
    "mia_retain_loss": Measure("retain passages, loss", "low", high=float("inf")),
}
"""ROUGE-L recall of the probes, loss of the passages in nats a token."""


@dataclass(frozen=True, repr=False)
class Material:
    """What a model is measured on."""

    forget: RowSet
    """The questions, as they stand in the file."""
    probes: Mapping[str, Sequence[tuple[Row, str]]]
    """By part each row as it is asked, and how its answer begins."""
    passages: Mapping[str, RowSet]
    """By part plain texts."""
    retain: RowSet | None = None
    """None: no form of the text is to be settled."""


def read(inputs: ProtocolInputs, model: CheckedModel, policies: Sequence[TextPolicy]) -> Material:
    """Reads every file that is given, and checks that it is of its part. Raises InputError."""
    if inputs.chat_template == "on" and not model.tokenizer.chat_template:
        raise InputError(
            f"{inputs.model}: its tokenizer has no chat template, under which RWKU asks; give"
            " --chat-template off to ask in plain text"
        )
    sources = {part: getattr(inputs, _field(part)) for part in (*PROBES, *PASSAGES)}
    sets = {part: _read_part(part, source) for part, source in sources.items() if source}
    probes = {
        part: [_asked(row, PROBES[part][1]) for row in rows]
        for part, rows in sets.items()
        if part in PROBES
    }
    passages = {part: rows for part, rows in sets.items() if part in PASSAGES}
    for policy in policies:
        for asked in probes.values():
            check_prompts_of((row for row, _ in asked), model.tokenizer, policy, OPENING)
        for rows in passages.values():
            _examples(rows, model.tokenizer, policy)
    return Material(sets[FORGET], probes, passages)


def _field(part: str) -> str:
    return "forget" if part == FORGET else part


def _read_part(part: str, source: str) -> RowSet:
    """The rows of one file, named after their part. Raises InputError for a file of another."""
    role = PROBES[part][0] if part in PROBES else PASSAGES[part]
    kind: Kind = "qa" if part in PROBES else "sc"
    opened = open_source(source, role)
    _check_columns(part, source, opened.records)
    columns = "prompt=query,output=answer" if part in PROBES else "text=text"
    if part == ATTACKS:
        columns += ",task=type"
    rows = named_after(part, Reading(columns=columns).read(source, role, opened=opened), role)
    return replace(rows, rows=tuple(replace(row, kind=kind) for row in rows))


def _check_columns(part: str, source: str, records: Sequence[Record]) -> None:
    """Raises InputError for a row that lacks a column of the part, or is of another level."""
    needed = ["query", "answer", "level"] if part in PROBES else ["text"]
    if part == ATTACKS:
        needed.append("type")
    option = f"--{_field(part)}"
    for record in records:
        if lacking := [name for name in needed if record.values.get(name) is None]:
            raise InputError(
                f"{source} {record.place}: has no {lacking[0]!r}, as rows of RWKU's {part} have; give"
                f" that file to {option}"
            )
        level = str(record.values.get("level"))
        if part in PROBES and level != part[-1]:
            found = f"is of level {level}" if level in _LEVELS else "is of no level that RWKU has"
            raise InputError(
                f"{source} {record.place}: {found}, {option} takes level {part[-1]}; give RWKU's"
                f" {part} to it"
            )


def _asked(row: Row, level: Level) -> tuple[Row, str]:
    prompt, opening = probe(row.input, level, row.task if level == 3 else "")
    return replace(row, input=prompt), opening


def _examples(rows: RowSet, tokenizer: PreTrainedTokenizerBase, policy: TextPolicy) -> list[Example]:
    """Passages as they stand on a page, whatever the form of the probes."""
    return encode_rows(rows, tokenizer, replace(policy, chat_template=False), eos=False)


def measure(material: Material, passes: Passes) -> ProtocolScores:
    """Asks and reads every part. Raises RunError for a model whose losses are no numbers."""
    scores: dict[str, float | None] = dict.fromkeys(MEASURES)
    records: list[dict[str, Any]] = []
    for part, asked in material.probes.items():
        found = _records(passes, part, asked)
        scores[part] = statistics.fmean(record["score"] for record in found)
        records += found
    for part, rows in material.passages.items():
        losses = passes.losses(_examples(rows, passes.tokenizer, passes.policy), part)
        check_finite(losses)
        scores[f"{part}_loss"] = statistics.fmean(losses.values())
    sets: dict[str, Sized] = {**material.probes, **material.passages}
    details = {
        "rows": {part: len(rows) for part, rows in sets.items()},
        "attacks": _by_attack(records),
    }
    return ProtocolScores(NAME, scores, details=details, records=records)


def _records(passes: Passes, part: str, asked: Sequence[tuple[Row, str]]) -> list[dict[str, Any]]:
    """A record a probe, with ROUGE-L recall."""
    rows, openings = [row for row, _ in asked], [opening for _, opening in asked]
    written = passes.written(rows, part, ANSWER_TOKENS, openings)
    records = []
    for row, said in zip(rows, written, strict=True):
        score = rouge_recall(writable(row, passes.tokenizer).output, said.text)
        records.append(record_of(row, part, score, said))
    return records


def _by_attack(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The mean of each form of attack, by its name in the file."""
    scores: dict[str, list[float]] = {}
    for record in records:
        if record["split"] == ATTACKS:
            scores.setdefault(record["task"], []).append(record["score"])
    return {attack: statistics.fmean(values) for attack, values in scores.items()}


PROTOCOL = Protocol(name=NAME, measures=MEASURES, read=read, measure=measure)
