"""The scorecard: regurgitation, knowledge, membership inference and utility, with their parts."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from expunge.data.rows import Row, RowSet, check_disjoint, documents
from expunge.data.tokenization import TextPolicy, encode_rows, prompt_ids, writable
from expunge.data.words import words
from expunge.errors import InputError
from expunge.evaluation.generation import Written
from expunge.evaluation.harness import Tasks, read_entries, read_tasks, run_tasks
from expunge.evaluation.memorisation import mean_memorisation, memorisation
from expunge.evaluation.multiple_choice import (
    Question,
    accuracy,
    check_prompts,
    prompt_for,
    read_questions,
)
from expunge.evaluation.passes import Passes, record_of
from expunge.evaluation.score_values import read_mapping, read_score
from expunge.evaluation.scores import final_score, knowledge, regurgitation, task_aggregate
from expunge.maths.membership import membership_auc, membership_score
from expunge.processes import OneProcess, Processes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KIND_NAMES: Mapping[str, str] = {"sc": "regurgitation", "qa": "knowledge"}
_TOTALS = ("task_aggregate", "mia_auc", "mia_score", "utility", "final_score")
Cells = dict[str, dict[str, float | None]]
Split = Literal["forget", "retain"]


@dataclass(frozen=True)
class Scorecard:
    """All scores of one model; what was not measured is None and never guessed."""

    forget: Cells
    """By task: regurgitation and knowledge in [0, 1], lower is better."""
    retain: Cells
    """By task: regurgitation and knowledge in [0, 1], higher is better."""
    task_aggregate: float | None
    mia_auc: float | None
    mia_score: float | None
    utility: float | None
    final_score: float | None
    memorisation: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    """By split: extraction strength and exact memorisation in [0, 1], means over rows."""
    harness: Mapping[str, Any] = field(default_factory=dict)
    """By task of lm-evaluation-harness: rows, shots, version and metrics, each with value and good."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Counts and mean losses behind the scores."""
    records: Sequence[Mapping[str, Any]] = field(default_factory=tuple, repr=False)
    """One entry a row: id, split, task, kind, score, extraction strength, exact memorisation, what was
    generated, and `runs_on`: whether the right answer came and no end of text behind it."""

    def to_json(self) -> dict[str, Any]:
        """The contents of scores.json; records are a file of their own."""
        return {name: value for name, value in vars(self).items() if name != "records"}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Scorecard:
        """Reads what `to_json` wrote.

        Raises KeyError for a file that is something else and InputError that names a cell which
        holds no score.
        """
        totals: dict[str, Any] = {name: read_score(name, values[name]) for name in _TOTALS}
        return cls(
            **totals,
            forget=_read_cells("forget", values["forget"]),
            retain=_read_cells("retain", values["retain"]),
            memorisation=_read_cells("memorisation", values.get("memorisation", {})),
            harness=read_entries(values.get("harness", {})),
            details=read_mapping("details", values.get("details", {})),
        )

    def mean(self, split: Split) -> float | None:
        """Mean of one side's measured cells."""
        values = _values(self.side(split))
        return statistics.fmean(values) if values else None

    def side(self, split: Split) -> Cells:
        """One side's cells."""
        return self.forget if split == "forget" else self.retain


@dataclass(frozen=True, repr=False)
class Material:
    """What a model is measured on; of what is None nothing is measured."""

    forget: RowSet
    retain: RowSet | None = None
    nonmembers: RowSet | None = None
    members: RowSet | None = None
    """Of the membership inference; None: the forget set's."""
    questions: Sequence[Question] | None = None
    examples: Mapping[str, Sequence[Question]] | None = None
    """By subject what stands solved before each question."""
    tasks: Tasks | None = None
    calibrated_on: bool = False
    """Whether the run that made the model was calibrated on the very non-members."""

    def check(self, tokenizer: PreTrainedTokenizerBase, policy: TextPolicy) -> None:
        """Raises InputError for sets that overlap and for rows and questions that do not fit the model.

        No weights are needed.
        """
        for other in (self.retain, self.nonmembers):
            if other is not None:
                check_disjoint(self.forget, other)
        if self.members is not None and self.nonmembers is not None:
            check_disjoint(self.members, self.nonmembers)
        for rows in (self.forget, self.retain or ()):
            check_prompts_of(rows, tokenizer, policy)
            encode_rows(rows, tokenizer, policy, eos=False)
        if self.nonmembers is not None:
            for rows in (self.members or self.forget, self.nonmembers):
                encode_rows(documents(rows), tokenizer, policy, eos=False)
        if self.questions:
            check_prompts(tokenizer, _prompts(self.questions, self.examples), policy.context)


def asked_beside(
    mmlu: str | Path | None, shots: int, harness: str | None, include: str | Path | None
) -> dict[str, Any]:
    """What is asked of `Material` beside the user's rows. Raises InputError for what cannot be read."""
    questions, examples = (None, None) if mmlu is None else read_questions(Path(mmlu), shots)
    tasks = None if harness is None else read_tasks(harness, include)
    return {"questions": questions, "examples": examples, "tasks": tasks}


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    material: Material,
    *,
    policy: TextPolicy,
    batch_size: int = 64,
    progress: Callable[[str, int, int], None] = lambda _name, _done, _total: None,
    processes: Processes | None = None,
) -> Scorecard:
    """Measures every part that there is material for, by the protocol of SemEval-2025 Task 4.

    Of members and non-members the continuation rows are compared, or all where there are none. Several
    processes, each with the model, share rows, documents and questions; each gets the whole scorecard.
    Raises InputError for rows that do not fit the context.
    """
    forget, retain, questions = material.forget, material.retain, material.questions
    passes = Passes(model, tokenizer, policy, batch_size, progress, processes or OneProcess())
    # First, for rows of the user's tasks are the least sure to be read to their end.
    harness, of_harness = ({}, None) if material.tasks is None else run_tasks(material.tasks, passes)
    records = _generated(passes, forget, "forget")
    if retain is not None:
        records += _generated(passes, retain, "retain")
    forget_cells, retain_cells = _cells(records, "forget"), _cells(records, "retain")
    aggregate = None
    if retain is not None:
        aggregate = task_aggregate(_values(forget_cells), _values(retain_cells))
    details: dict[str, Any] = {
        "rows": {"forget": len(forget), "retain": len(retain) if retain is not None else 0},
        "dtype": str(model.dtype).removeprefix("torch."),
        "text": policy.describe(tokenizer),
        "questions": {split: _questions(records, split) for split in ("forget", "retain")},
    }
    if of_harness is not None:
        details["harness"] = of_harness
    auc = mia = None
    if material.nonmembers is not None:
        inside = _losses(passes, material.members or forget, "members")
        others = _losses(passes, material.nonmembers, "non-members")
        auc = membership_auc(inside, others)
        mia = membership_score(auc)
        details["mia"] = {
            "members": len(inside),
            "nonmembers": len(others),
            # Further digits are float32's rounding, which changes with the batch.
            "mean_member_loss": round(statistics.fmean(inside), 6),
            "mean_nonmember_loss": round(statistics.fmean(others), 6),
            **({"calibrated_on": True} if material.calibrated_on else {}),
        }
    utility = None
    if questions is not None:
        utility, by_subject = _utility(passes, questions, material.examples or {})
        details["utility"] = {"questions": len(questions), "by_subject": by_subject}
    return Scorecard(
        forget=forget_cells,
        retain=retain_cells,
        task_aggregate=aggregate,
        mia_auc=auc,
        mia_score=mia,
        utility=utility,
        final_score=final_score(aggregate, mia, utility),
        memorisation={
            split: mean_memorisation(r for r in records if r["split"] == split)
            for split in ("forget", "retain")
        },
        harness=harness,
        details=details,
        records=records,
    )


def check_prompts_of(
    rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, policy: TextPolicy, opening: str = ""
) -> None:
    """Raises InputError for a row whose prompt, with `opening`, leaves no room for an answer."""
    for row in rows:
        length = len(prompt_ids(row, tokenizer, policy, opening))
        if length >= policy.context:
            raise InputError(
                f"row {row.id!r}: its prompt has {length} tokens and fills the context of"
                f" {policy.context}; shorten it"
            )


def _generated(passes: Passes, rows: RowSet, split: Split) -> list[dict[str, Any]]:
    """A record a row, in the order of the rows; a question's answer counts only if it is exact."""
    told = [writable(row, passes.tokenizer) for row in rows]
    exact = [row.output if row.kind == "qa" else None for row in told]
    written = passes.written(rows.rows, split, exact=exact)
    return [_record(row, split, found) for row, found in zip(told, written, strict=True)]


def _losses(passes: Passes, rows: RowSet, name: str) -> list[float]:
    """The mean loss of each document, in nats a token."""
    examples = encode_rows(documents(rows), passes.tokenizer, passes.policy, eos=False)
    return list(passes.losses(examples, name).values())


def _utility(
    passes: Passes, questions: Sequence[Question], examples: Mapping[str, Sequence[Question]]
) -> tuple[float, dict[str, float]]:
    """Accuracy over all questions, and by subject."""
    scores = passes.choices(_prompts(questions, examples), "utility")
    by_subject = {}
    for subject in sorted({question.subject for question in questions}):
        chosen = [i for i, question in enumerate(questions) if question.subject == subject]
        by_subject[subject] = accuracy(scores[chosen], [questions[i] for i in chosen])
    return accuracy(scores, questions), by_subject


def _record(row: Row, split: Split, written: Written) -> dict[str, Any]:
    measure = regurgitation if row.kind == "sc" else knowledge
    score, wanted = measure(row.output, written.text), words(row.output)
    begun = words(written.text)[: len(wanted)] == wanted != []
    runs_on = row.kind == "qa" and score == 0 and begun and not written.ended
    return record_of(row, split, score, written, {**memorisation(written.right), "runs_on": runs_on})


def _cells(records: Sequence[Mapping[str, Any]], split: Split) -> Cells:
    """Mean score by task and kind; a kind that a task has no rows of is None."""
    cells: Cells = {}
    mine = [record for record in records if record["split"] == split]
    for task in sorted({record["task"] for record in mine}):
        cells[task] = {}
        for kind, name in KIND_NAMES.items():
            scores = [r["score"] for r in mine if r["task"] == task and r["kind"] == kind]
            cells[task][name] = statistics.fmean(scores) if scores else None
    return cells


def _questions(records: Sequence[Mapping[str, Any]], split: str) -> dict[str, int]:
    """How many there are, and how many got the right answer and then no end of text."""
    mine = [r for r in records if r["split"] == split and r["kind"] == "qa"]
    return {"asked": len(mine), "runs_on": sum(r["runs_on"] for r in mine)}


def _values(cells: Cells) -> list[float]:
    return [value for cell in cells.values() for value in cell.values() if value is not None]


def _prompts(
    questions: Sequence[Question], examples: Mapping[str, Sequence[Question]] | None
) -> list[str]:
    return [prompt_for(question, (examples or {}).get(question.subject, ())) for question in questions]


def _read_cells(split: str, values: object) -> Cells:
    return {
        task: {
            name: read_score(f"{split} {task} {name}", value)
            for name, value in read_mapping(f"{split} {task}", cell).items()
        }
        for task, cell in read_mapping(split, values).items()
    }
