"""Direct questions: every fact asked by its own input, and retain rows as a control. No attack yet."""

from __future__ import annotations

from expunge.audits.base import Advance, Attack, Case, Found
from expunge.audits.subject import Subject


def run(subject: Subject, case: Case, advance: Advance) -> Found:
    """Greedy answers to forget and retain rows."""
    forget = subject.direct(case.facts)
    advance(1, 2)
    retain = subject.direct(case.retain)
    advance(2, 2)
    return Found(
        scores={"input": forget.scores},
        control={"input": retain.scores},
        texts={"input": forget.texts},
    )


ATTACK = Attack(
    name="direct",
    title="Direct questions",
    kind="extraction",
    reference="arXiv 2407.06460",
    how="when asked by their own prompts",
    run=run,
)
