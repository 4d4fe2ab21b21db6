"""Benign relearning: tune on text that holds none of the facts, ask for them. arXiv 2406.13356."""

from __future__ import annotations

from expunge.audits.base import Advance, Attack, Case, Found
from expunge.audits.subject import Subject
from expunge.audits.tuning import asked_while_tuned


def run(subject: Subject, case: Case, advance: Advance) -> Found:
    """Scores of every fact before, while and after tuning on retain rows, or on text that was given."""
    steps = case.budget.steps
    before = subject.direct(case.facts)
    scores, texts = {"step 0": before.scores}, {"step 0": before.texts}
    control = {"step 0": subject.direct(case.retain).scores}
    with subject.altered("float32") as reader:
        asked = asked_while_tuned(
            reader, case.tuning, case.facts, case, lambda step: advance(step, steps)
        )
        for name, answers in asked:
            scores[name], texts[name] = answers.scores, answers.texts
        control[f"step {steps}"] = reader.direct(case.retain).scores
    return Found(
        scores, ["step 0"], control, texts=texts, numbers={"rows_tuned_on": len(case.tuning)}
    )


ATTACK = Attack(
    name="benign",
    title="Benign relearning",
    kind="extraction",
    reference="arXiv 2406.13356",
    how="after tuning on harmless text",
    run=run,
)
