"""Held-out relearning: tune on some of the forgotten subjects, ask for the others.

What comes back of subjects that the tuning never showed was not removed but hidden. Deeb and Roger,
arXiv 2410.08827.
"""

from __future__ import annotations

from expunge.audits.base import Advance, Attack, Case, Found
from expunge.audits.facts import halves
from expunge.audits.subject import Subject
from expunge.audits.tuning import asked_while_tuned


def run(subject: Subject, case: Case, advance: Advance) -> Found:
    """Scores of the held-out facts after some steps on the others; with two folds, of every fact."""
    budget = case.budget
    scores: dict[str, dict[str, float]] = {}
    texts: dict[str, dict[str, str]] = {}
    shown, held_out = halves(case.facts, case.seed)
    folds = [(shown, held_out), (held_out, shown)][: budget.folds]
    whole = len(folds) * budget.steps
    for fold, (train, measured) in enumerate(folds):
        with subject.altered("float32") as reader:

            def done(step: int, before: int = fold * budget.steps) -> None:
                advance(before + step, whole)

            for name, answers in asked_while_tuned(reader, train, measured, case, done):
                scores.setdefault(name, {}).update(answers.scores)
                texts.setdefault(name, {}).update(answers.texts)
    return Found(scores, texts=texts, numbers={"rows_tuned_on": [len(t) for t, _ in folds]})


ATTACK = Attack(
    name="relearn",
    title="Held-out relearning",
    kind="extraction",
    reference="arXiv 2410.08827",
    how="after tuning on other forgotten subjects",
    run=run,
)
