"""The scorecard: regurgitation, knowledge, membership inference and utility, with their parts."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from expunge.data.rows import Row, RowSet, check_disjoint, documents
from expunge.data.tokenization import TextPolicy, encode_rows, prompt_ids
from expunge.errors import InputError
from expunge.evaluation.generation import generate
from expunge.evaluation.membership import document_losses
from expunge.evaluation.multiple_choice import (
    Question,
    accuracy,
    check_prompts,
    choice_log_probs,
    prompt_for,
)
from expunge.evaluation.scores import final_score, knowledge, regurgitation, task_aggregate
from expunge.methods.membership import membership_auc, membership_score
from expunge.models.loading import pad_id_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KIND_NAMES: Mapping[str, str] = {"sc": "regurgitation", "qa": "knowledge"}
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
    details: Mapping[str, Any] = field(default_factory=dict)
    """Counts and mean losses behind the scores."""
    records: Sequence[Mapping[str, Any]] = field(default_factory=tuple, repr=False)
    """One entry a row: id, split, task, kind, score and what was generated."""

    def to_json(self) -> dict[str, Any]:
        """The contents of scores.json; records are a file of their own."""
        return {
            "forget": self.forget,
            "retain": self.retain,
            "task_aggregate": self.task_aggregate,
            "mia_auc": self.mia_auc,
            "mia_score": self.mia_score,
            "utility": self.utility,
            "final_score": self.final_score,
            "details": dict(self.details),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Scorecard:
        """Reads what `to_json` wrote. Raises KeyError for a file that is something else."""
        names = ("forget", "retain", "task_aggregate", "mia_auc", "mia_score", "utility")
        return cls(
            **{name: values[name] for name in (*names, "final_score")},
            details=values.get("details", {}),
        )

    def mean(self, split: Split) -> float | None:
        """Mean of one side's measured cells."""
        cells = self.forget if split == "forget" else self.retain
        values = [v for cell in cells.values() for v in cell.values() if v is not None]
        return statistics.fmean(values) if values else None


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    forget: RowSet,
    retain: RowSet | None,
    nonmembers: RowSet | None = None,
    questions: Sequence[Question] | None = None,
    examples: Mapping[str, Sequence[Question]] | None = None,
    *,
    members: RowSet | None = None,
    policy: TextPolicy,
    batch_size: int = 64,
    progress: Callable[[str, int, int], None] = lambda _name, _done, _total: None,
) -> Scorecard:
    """Measures every part that there is material for, by the protocol of SemEval-2025 Task 4.

    Members of the membership inference are those of `members`, or the forget set's continuation rows
    (all of its rows where it has none), as non-members are. Raises InputError for rows that do not
    fit the context.
    """
    records = _generated(model, tokenizer, forget, "forget", policy, batch_size, progress)
    if retain is not None:
        records += _generated(model, tokenizer, retain, "retain", policy, batch_size, progress)
    forget_cells, retain_cells = _cells(records, "forget"), _cells(records, "retain")
    aggregate = None
    if retain is not None:
        aggregate = task_aggregate(_values(forget_cells), _values(retain_cells))
    details: dict[str, Any] = {
        "rows": {"forget": len(forget), "retain": len(retain) if retain is not None else 0},
        "dtype": str(model.dtype).removeprefix("torch."),
        "text": policy.describe(tokenizer),
    }
    auc = mia = None
    if nonmembers is not None:
        inside = _losses(
            model, tokenizer, members or forget, policy, batch_size, progress, "members"
        )
        others = _losses(model, tokenizer, nonmembers, policy, batch_size, progress, "non-members")
        auc = membership_auc(inside, others)
        mia = membership_score(auc)
        details["mia"] = {
            "members": len(inside),
            "nonmembers": len(others),
            # Further digits are float32's rounding, which changes with the batch.
            "mean_member_loss": round(statistics.fmean(inside), 6),
            "mean_nonmember_loss": round(statistics.fmean(others), 6),
        }
    utility = None
    if questions is not None:
        utility, by_subject = _utility(
            model, tokenizer, questions, examples or {}, batch_size, progress
        )
        details["utility"] = {"questions": len(questions), "by_subject": by_subject}
    return Scorecard(
        forget=forget_cells,
        retain=retain_cells,
        task_aggregate=aggregate,
        mia_auc=auc,
        mia_score=mia,
        utility=utility,
        final_score=final_score(aggregate, mia, utility),
        details=details,
        records=records,
    )


def check_material(
    tokenizer: PreTrainedTokenizerBase,
    forget: RowSet,
    retain: RowSet | None,
    nonmembers: RowSet | None,
    questions: Sequence[Question] | None,
    examples: Mapping[str, Sequence[Question]] | None,
    policy: TextPolicy,
) -> None:
    """Raises InputError for sets that overlap and for rows and questions that do not fit the model.

    No weights are needed.
    """
    for other in (retain, nonmembers):
        if other is not None:
            check_disjoint(forget, other)
    for rows in (forget, retain or ()):
        for row in rows:
            length = len(prompt_ids(row, tokenizer, policy))
            if length >= policy.context:
                raise InputError(
                    f"row {row.id!r}: its prompt has {length} tokens and fills the context of"
                    f" {policy.context}; shorten it"
                )
        encode_rows(rows, tokenizer, policy, eos=False)
    if nonmembers is not None:
        for rows in (forget, nonmembers):
            encode_rows(documents(rows), tokenizer, policy, eos=False)
    if questions:
        check_prompts(tokenizer, _prompts(questions, examples), policy.context)


def _generated(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: RowSet,
    split: Split,
    policy: TextPolicy,
    batch_size: int,
    progress: Callable[[str, int, int], None],
) -> list[dict[str, Any]]:
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(f"generate {split}", done, len(rows))

    prompts = [prompt_ids(row, tokenizer, policy) for row in rows]
    drafts = [
        _answer_ids(row, prompt, tokenizer, policy)
        for row, prompt in zip(rows, prompts, strict=True)
    ]
    texts = generate(model, tokenizer, prompts, batch_size, advance, drafts)
    return [_record(row, split, text) for row, text in zip(rows, texts, strict=True)]


def _answer_ids(
    row: Row, prompt: Sequence[int], tokenizer: PreTrainedTokenizerBase, policy: TextPolicy
) -> list[int]:
    """The tokens of the row's output: what a model that knows the row writes, so worth a try."""
    if policy.chat_template:
        return list(tokenizer(row.output, add_special_tokens=False)["input_ids"])
    whole = list(tokenizer(row.text)["input_ids"])
    if whole[: len(prompt)] == list(prompt):
        return whole[len(prompt) :]
    return list(tokenizer(f" {row.output}", add_special_tokens=False)["input_ids"])


def _record(row: Row, split: Split, text: str) -> dict[str, Any]:
    measure = regurgitation if row.kind == "sc" else knowledge
    return {
        "id": row.id,
        "split": split,
        "task": row.task,
        "kind": row.kind,
        "score": measure(row.output, text),
        "generated": text,
    }


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


def _values(cells: Cells) -> list[float]:
    return [value for cell in cells.values() for value in cell.values() if value is not None]


def _prompts(
    questions: Sequence[Question], examples: Mapping[str, Sequence[Question]] | None
) -> list[str]:
    return [
        prompt_for(question, (examples or {}).get(question.subject, ())) for question in questions
    ]


def _losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: RowSet,
    policy: TextPolicy,
    batch_size: int,
    progress: Callable[[str, int, int], None],
    name: str,
) -> list[float]:
    examples = encode_rows(documents(rows), tokenizer, policy, eos=False)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(f"loss of {name}", done, len(examples))

    losses = document_losses(model, examples, pad_id_of(tokenizer), batch_size, advance)
    return list(losses.values())


def _utility(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    examples: Mapping[str, Sequence[Question]],
    batch_size: int,
    progress: Callable[[str, int, int], None],
) -> tuple[float, dict[str, float]]:
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress("utility", done, len(questions))

    prompts = _prompts(questions, examples)
    scores = choice_log_probs(model, tokenizer, prompts, batch_size, advance)
    by_subject = {}
    for subject in sorted({question.subject for question in questions}):
        chosen = [i for i, question in enumerate(questions) if question.subject == subject]
        by_subject[subject] = accuracy(scores[chosen], [questions[i] for i in chosen])
    return accuracy(scores, questions), by_subject
