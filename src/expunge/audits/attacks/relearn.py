"""Held-out relearning: tune on some of the forgotten subjects, ask for the others.

What comes back of subjects that the tuning never showed was not removed but hidden. Deeb and Roger,
arXiv 2410.08827.
"""

from __future__ import annotations

from dataclasses import replace

from expunge.audits.base import Advance, Attack, Case, Found
from expunge.audits.facts import halves
from expunge.audits.subject import Subject
from expunge.audits.tuning import Fold, asked_while_tuned
from expunge.data.rows import by_document


def run(subject: Subject, case: Case, advance: Advance) -> Found:
    """Scores of the held-out facts after some steps on the others; with two folds, of every fact.

    Of one document none can be held out: other people's rows, retain rows of its tasks, are tuned on.
    """
    if len(by_document(case.facts)) < 2:
        tasks = {row.task for row in case.facts}
        shown = [row for row in case.others if row.task in tasks] or list(case.others)
        fold = Fold(shown, case.facts, case.retain)
        found = asked_while_tuned(subject, case, [fold], advance, apart=case.budget.apart)
        return replace(found, numbers={**found.numbers, "tuned_on": "retain"})
    shown, held_out = halves(case.facts, case.seed)
    folds = [Fold(shown, held_out, case.retain)]
    if case.budget.folds == 2:
        # Each fold's model answers for half of the retain rows, as it does for half of the facts.
        first, second = halves(case.retain, case.seed)
        folds = [Fold(shown, held_out, first), Fold(held_out, shown, second)]
    return asked_while_tuned(subject, case, folds, advance, apart=case.budget.apart)


ATTACK = Attack(
    name="relearn",
    title="Held-out relearning",
    kind="extraction",
    reference="arXiv 2410.08827",
    how="after tuning on other forgotten subjects",
    run=run,
    tunes=True,
)
