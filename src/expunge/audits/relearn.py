"""Held-out relearning: tune on some of the forgotten subjects, ask for the others.

What comes back of subjects that the tuning never showed was not removed but hidden. Deeb and Roger,
arXiv 2410.08827.
"""

from __future__ import annotations

from expunge.audits.base import Advance, Attack, Case, Found
from expunge.audits.facts import halves
from expunge.audits.subject import Subject
from expunge.audits.tuning import measured_steps, tuned
from expunge.data.tokenization import encode_rows


def run(subject: Subject, case: Case, advance: Advance) -> Found:
    """Scores of the held-out facts after some steps on the others; with two folds, of every fact."""
    budget = case.budget
    scores: dict[str, dict[str, float]] = {}
    texts: dict[str, dict[str, str]] = {}
    shown, held_out = halves(case.facts, case.seed)
    folds = [(shown, held_out), (held_out, shown)][: budget.folds]
    for fold, (train, measured) in enumerate(folds):
        with subject.altered("float32") as reader:
            examples = encode_rows(train, reader.tokenizer, reader.policy, eos=True)
            for step in tuned(
                reader.model,
                reader.tokenizer,
                examples,
                steps=budget.steps,
                rows=budget.tuning_rows,
                learning_rate=case.learning_rate,
                seed=case.seed,
            ):
                advance(fold * budget.steps + step, len(folds) * budget.steps)
                if step in measured_steps(budget.steps, budget.measures):
                    answers = reader.direct(measured)
                    scores.setdefault(f"step {step}", {}).update(answers.scores)
                    texts.setdefault(f"step {step}", {}).update(answers.texts)
    return Found(scores, texts=texts, numbers={"rows_tuned_on": [len(t) for t, _ in folds]})


ATTACK = Attack(
    name="relearn",
    title="Held-out relearning",
    kind="extraction",
    reference="arXiv 2410.08827",
    how="after tuning on other forgotten subjects",
    run=run,
)
