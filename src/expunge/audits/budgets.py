"""How much each audit computes: rows, steps and samples by the name of a budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

BudgetName = Literal["quick", "standard", "thorough"]


@dataclass(frozen=True)
class Budget:
    """Sizes of every attack; whole documents are drawn, so a few rows more than asked may be taken."""

    facts: int | None
    """Forget rows that are asked for; None is all."""
    retain: int | None
    """Retain rows that are asked for, as a control."""
    nonmembers: int | None
    """Never-seen texts of membership inference."""
    tokens: int
    """Tokens of a continuation that are looked for; answers are looked for as a whole."""
    steps: int
    """Steps that an attack by tuning takes."""
    measures: int
    """Times that a tuned model is asked, evenly spaced over the steps."""
    tuning_rows: int
    """Rows of each of these steps."""
    folds: int
    """1: half of the subjects is tuned on and the other measured; 2: also the other way round."""
    samples: int
    """Sampled answers for each fact and temperature."""
    layers: int | None
    """Layers whose direction is ablated, evenly spaced; None is all."""
    resamples: int
    """Resamples of the documents for each interval."""
    rates: tuple[float, ...] = (1.0,)
    """Factors of the learning rate, each a tuning of its own: what one rate misses another may find."""
    lora: bool = False
    """Whether one more tuning trains a low-rank adapter in the place of every weight."""
    apart: bool = False
    """Whether relearning tunes on questions alone and on continuations alone as well."""


BUDGETS: Mapping[BudgetName, Budget] = {
    # Two folds: half of so few documents could not bound what relearning recovers.
    "quick": Budget(
        facts=40, retain=24, nonmembers=48, tokens=32, steps=16, measures=2, tuning_rows=8,
        folds=2, samples=6, layers=3, resamples=1000, rates=(1.0, 3.0),
    ),
    "standard": Budget(
        facts=200, retain=100, nonmembers=200, tokens=128, steps=80, measures=4, tuning_rows=16,
        folds=2, samples=32, layers=8, resamples=2000, rates=(0.3, 1.0, 3.0), apart=True,
    ),
    "thorough": Budget(
        facts=None, retain=400, nonmembers=None, tokens=256, steps=300, measures=6, tuning_rows=16,
        folds=2, samples=128, layers=None, resamples=10000, rates=(0.1, 0.3, 1.0, 3.0), lora=True,
        apart=True,
    ),
}  # fmt: skip
