"""AltPO: an alternative answer of the same form is preferred over the forget answer.

    L = -(2 / beta) * mean_F log sigmoid(beta * (log (pi / pi_ref)(other) - log (pi / pi_ref)(output)))
        + w * CE(retain)

Mekala et al., arXiv 2409.13474. There a model is asked for several alternatives of every answer. Here
rules make one in memory: other names, numbers and rare words of the rows (`counterfactuals`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from expunge.data.rows import Row
from expunge.methods.base import RunDefaults
from expunge.methods.counterfactuals import other_answers
from expunge.methods.preference import PreferenceSettings


@dataclass(frozen=True)
class AltPO(PreferenceSettings):
    """Settings of AltPO."""

    name: ClassVar[str] = "alt-po"
    defaults: ClassVar[RunDefaults] = RunDefaults(epochs=10, batch_size=16, learning_rate=1e-3)

    def preferred(self, forget: Sequence[Row], retain: Sequence[Row], seed: int) -> Sequence[Row]:
        """Each row with other names, numbers and rare words."""
        return other_answers(forget, retain, seed)
