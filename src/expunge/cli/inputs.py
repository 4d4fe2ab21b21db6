"""What the scores and the audit of a run are told: what the run itself was."""

from __future__ import annotations

from expunge.audits.inputs import AuditInputs
from expunge.evaluation.measuring import MeasureInputs
from expunge.runs.run import RunInputs
from expunge.training.options import TrainingOptions


def scores_of(inputs: RunInputs, training: TrainingOptions) -> MeasureInputs:
    """How a run's target is measured, and its result likewise."""
    form = training.chat_template
    return inputs.into(MeasureInputs, output=None, chat_template=form, long_rows=training.long_rows)


def audit_of(inputs: RunInputs, training: TrainingOptions) -> AuditInputs:
    """How a run's result is attacked; the target stands for it. Each model runs in its own dtype."""
    return inputs.into(
        AuditInputs,
        original=inputs.model,
        output=None,
        dtype="auto",
        seed=training.seed,
        chat_template=training.chat_template,
        long_rows=training.long_rows,
    )
