"""Benign relearning: tune on text that holds none of the facts, ask for them. arXiv 2406.13356."""

from __future__ import annotations

from dataclasses import replace

from expunge.audits.base import Advance, Attack, Case, Found
from expunge.audits.subject import Subject
from expunge.audits.tuning import Fold, asked_while_tuned


def run(subject: Subject, case: Case, advance: Advance) -> Found:
    """Scores of every fact before, while and after tuning on retain rows, or on text that was given."""
    before, kept = subject.direct(case.facts), subject.direct(case.retain)
    folds = [Fold(case.tuning, case.facts, case.retain)]
    found = asked_while_tuned(subject, case, folds, advance)
    return replace(
        found,
        scores={"step 0": before.scores, **found.scores},
        beside=["step 0"],
        control={"step 0": kept.scores, **found.control},
        texts={"step 0": before.texts, **found.texts},
    )


ATTACK = Attack(
    name="benign",
    title="Benign relearning",
    kind="extraction",
    reference="arXiv 2406.13356",
    how="after tuning on harmless text",
    run=run,
    tunes=True,
)
