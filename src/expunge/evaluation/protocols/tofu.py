"""TOFU on a model (arXiv 2401.06121): forget quality and model utility with their parts.

Losses are of an answer and its end of text, as the authors count them; `evaluation.tofu` has the
formulas.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from expunge.data.columns import text_in, type_name
from expunge.data.formats import Record, Role, open_source
from expunge.data.rows import Row, RowSet, check_disjoint
from expunge.data.tokenization import Example, TextPolicy, encode_rows, writable
from expunge.errors import InputError
from expunge.evaluation.memorisation import mean_memorisation, memorisation
from expunge.evaluation.passes import Passes, record_of
from expunge.evaluation.protocols.base import (
    Measure,
    Protocol,
    ProtocolScores,
    check_finite,
    named_after,
)
from expunge.evaluation.protocols.inputs import ProtocolInputs
from expunge.evaluation.score_files import read_protocol_scores
from expunge.evaluation.scorecard import check_prompts_of
from expunge.evaluation.scores import regurgitation
from expunge.evaluation.tofu import GENERAL, SetLosses, SetName, all_scores
from expunge.models.loading import CheckedModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAME = "tofu"
RIGHT, WRONG = "paraphrased_answer", "perturbed_answer"
RATIO = "log_truth_ratio"
_ROLES: Mapping[SetName, Role] = {
    "forget": "forget", "retain": "retain", "real_authors": "nonmembers", "world_facts": "nonmembers",
}  # fmt: skip
MEASURES: Mapping[str, Measure] = {
    "forget_quality": Measure("forget quality (p-value)", "high", form=".3g"),
    "forget_truth_ratio": Measure("forget truth ratio", "high"),
    "forget_probability": Measure("forget probability", "low"),
    "forget_rouge": Measure("forget ROUGE-L recall", "low"),
    "forget_extraction_strength": Measure("forget extraction strength", "low"),
    "forget_exact_memorisation": Measure("forget exact memorisation", "low"),
    "model_utility": Measure("model utility", "high"),
    **{
        f"{name}_{part}": Measure(f"{name.replace('_', ' ')} {title}", "high")
        for name in ("retain", "real_authors", "world_facts")
        for part, title in (
            ("probability", "probability"),
            ("rouge", "ROUGE-L recall"),
            ("truth_ratio", "truth ratio"),
        )
    },
    "retain_extraction_strength": Measure("retain extraction strength", "high"),
    "retain_exact_memorisation": Measure("retain exact memorisation", "high"),
}


@dataclass(frozen=True, repr=False)
class Questions:
    """One set, with the answers that its rows are asked to be told from."""

    rows: RowSet
    right: Sequence[str] | None
    """By row the right answer in the wrong ones' form; None where the file has none."""
    wrong: Sequence[Sequence[str]] | None

    def worded(self) -> Iterator[list[Row]]:
        """By row: itself, the right answer's wording, the wrong ones."""
        for number, row in enumerate(self.rows):
            rows = [row]
            if self.right is not None and self.wrong is not None:
                others = [("right answer", self.right[number])]
                others += [(f"wrong answer {n}", text) for n, text in enumerate(self.wrong[number], 1)]
                rows += [replace(row, id=f"{row.id} ({name})", output=text) for name, text in others]
            yield rows

    def examples(self, tokenizer: PreTrainedTokenizerBase, policy: TextPolicy) -> list[Example]:
        """Every wording, of which the answer and its end count."""
        rows = [row for rows in self.worded() for row in rows]
        encoded = encode_rows(rows, tokenizer, policy, eos=True)
        return [replace(example, token_mask=example.answer_mask) for example in encoded]


@dataclass(frozen=True, repr=False)
class Material:
    """What a model is measured on."""

    sets: Mapping[SetName, Questions]
    oracle: Mapping[str, float] | None
    """Log truth ratios of the retrained model by forget row."""

    @property
    def forget(self) -> RowSet:
        """Rows that were to be removed."""
        return self.sets["forget"].rows

    @property
    def retain(self) -> RowSet | None:
        """Rows that were to stay."""
        return self.sets["retain"].rows if "retain" in self.sets else None


def read(inputs: ProtocolInputs, model: CheckedModel, policies: Sequence[TextPolicy]) -> Material:
    """Reads the sets and the oracle's scores, and checks that they fit. Raises InputError."""
    sets = {
        name: _read_set(inputs, name, source)
        for name in _ROLES
        if (source := getattr(inputs, name)) is not None
    }
    forget = sets["forget"]
    for name, other in sets.items():
        if name != "forget":
            check_disjoint(forget.rows, other.rows)
    for policy in policies:
        for questions in sets.values():
            check_prompts_of(questions.rows, model.tokenizer, policy)
            questions.examples(model.tokenizer, policy)
    oracle = None
    if inputs.oracle_scores is not None:
        oracle = _read_oracle(inputs.oracle_scores, forget)
    return Material(sets, oracle)


def _read_set(inputs: ProtocolInputs, name: SetName, source: str) -> Questions:
    role = _ROLES[name]
    opened = open_source(source, role)
    rows = named_after(name, inputs.read(source, role, opened=opened), role)
    wrong = _column(source, opened.records, WRONG, _texts_in)
    right = [row.output for row in rows] if name in GENERAL else None
    if right is None:
        right = _column(source, opened.records, RIGHT, text_in)
    return Questions(rows, right, wrong)


def _column(source: str, records: Sequence[Record], column: str, read_one: Any) -> Any:
    """A column's values by row, or None where no row has it. Raises InputError where some have."""
    if all(record.values.get(column) is None for record in records):
        return None
    values = []
    for record in records:
        try:
            values.append(read_one(record.values, column))
        except InputError as fault:
            raise InputError(f"{source} {record.place}: {fault.args[0]}") from None
    return values


def _texts_in(values: Mapping[str, object], column: str) -> list[str]:
    texts = values.get(column)
    if not isinstance(texts, list) or not texts:
        raise InputError(
            f"column {column!r} holds a {type_name(texts)} where wrong answers belong; give a list"
        )
    return [text_in({column: text}, column) for text in texts]


def _read_oracle(source: str, forget: Questions) -> Mapping[str, float]:
    """Log truth ratios of the retrained model's scores. Raises InputError where the rows are others."""
    ratios = read_protocol_scores(source, NAME, MEASURES).rows.get(RATIO, {})
    if forget.right is None or forget.wrong is None:
        raise InputError(
            f"{forget.rows.source}: has no columns {RIGHT!r} and {WRONG!r}, which forget quality"
            " compares; give the perturbed file, or leave --oracle-scores out"
        )
    if set(ratios) != {row.id for row in forget.rows}:
        raise InputError(
            f"--oracle-scores {source}: has the truth ratios of {len(ratios)} forget rows, not of these"
            f" {len(forget.rows)}; measure the oracle with the same --forget"
        )
    return ratios


def measure(material: Material, passes: Passes) -> ProtocolScores:
    """Generates and reads every set. Raises RunError for a model whose losses are no numbers."""
    sets: dict[SetName, SetLosses] = {}
    records: list[dict[str, Any]] = []
    for name, questions in material.sets.items():
        sets[name], told = _measured(name, questions, passes)
        records += told
    oracle = None if material.oracle is None else list(material.oracle.values())
    scores = all_scores(sets, oracle)
    for name in ("forget", "retain"):
        means = mean_memorisation(record for record in records if record["split"] == name)
        scores |= {f"{name}_{part}": value for part, value in means.items()}
    ratios = {r["id"]: r[RATIO] for r in records if r["split"] == "forget" and r[RATIO] is not None}
    return ProtocolScores(
        protocol=NAME,
        scores={name: scores[name] for name in MEASURES},
        rows={RATIO: ratios},
        details={"rows": {name: len(questions.rows) for name, questions in material.sets.items()}},
        records=records,
    )


def _measured(
    name: SetName, questions: Questions, passes: Passes
) -> tuple[SetLosses, list[dict[str, Any]]]:
    """Losses and ROUGE of a set, and a record a row."""
    written = passes.written(questions.rows.rows, name)
    losses = passes.losses(questions.examples(passes.tokenizer, passes.policy), name)
    check_finite(losses)
    by_row = [[losses[row.id] for row in rows] for rows in questions.worded()]
    compared = questions.right is not None and questions.wrong is not None
    found = SetLosses(
        answer=[own for own, *_ in by_row],
        rouge=[
            regurgitation(writable(row, passes.tokenizer).output, said.text)
            for row, said in zip(questions.rows, written, strict=True)
        ],
        right=[right for _, right, *_ in by_row] if compared else None,
        wrong=[others for _, _, *others in by_row] if compared else None,
    )
    ratios: Sequence[float | None] = found.log_truth_ratios() or [None] * len(by_row)
    lines = zip(questions.rows, written, found.rouge, found.answer, ratios, strict=True)
    records = []
    for row, said, rouge, loss, ratio in lines:
        told = {"probability": math.exp(-loss), RATIO: ratio, **memorisation(said.right)}
        records.append(record_of(row, name, rouge, said, told))
    return found, records


PROTOCOL = Protocol(name=NAME, measures=MEASURES, read=read, measure=measure)
