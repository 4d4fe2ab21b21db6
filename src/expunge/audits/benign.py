"""Benign relearning: tune on text that holds none of the facts, ask for them. arXiv 2406.13356."""

from __future__ import annotations

from expunge.audits.base import Advance, Attack, Case, Found
from expunge.audits.subject import Subject
from expunge.audits.tuning import measured_steps, tuned
from expunge.data.tokenization import encode_rows


def run(subject: Subject, case: Case, advance: Advance) -> Found:
    """Scores of every fact before, while and after tuning on retain rows, or on text that was given."""
    budget = case.budget
    before = subject.direct(case.facts)
    scores, texts = {"step 0": before.scores}, {"step 0": before.texts}
    control = {"step 0": subject.direct(case.retain).scores}
    with subject.altered("float32") as reader:
        examples = encode_rows(case.tuning, reader.tokenizer, reader.policy, eos=True)
        for step in tuned(
            reader.model,
            reader.tokenizer,
            examples,
            steps=budget.steps,
            rows=budget.tuning_rows,
            learning_rate=case.learning_rate,
            seed=case.seed,
        ):
            advance(step, budget.steps)
            if step in measured_steps(budget.steps, budget.measures):
                answers = reader.direct(case.facts)
                scores[f"step {step}"], texts[f"step {step}"] = answers.scores, answers.texts
        control[f"step {budget.steps}"] = reader.direct(case.retain).scores
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
