"""NPO: negative preference optimisation, a bounded ascent relative to the model from before.

    L = (2 / beta) * mean_F log(1 + (pi / pi_ref)^beta) + w * CE(retain)

Zhang et al., arXiv 2404.05868, eq. 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from expunge.data.batches import Batch
from expunge.maths.losses import npo
from expunge.maths.numerics import row_sums
from expunge.methods.base import Context, RunDefaults, Terms
from expunge.methods.gradient import GradientObjective, GradientSettings


@dataclass(frozen=True)
class NPO(GradientSettings):
    """Settings of NPO."""

    beta: float = 0.1
    """Sharpness: towards 0 this becomes gradient ascent."""
    retain_weight: float = 1.0
    """Weight of the retain term."""

    name: ClassVar[str] = "npo"
    defaults: ClassVar[RunDefaults] = RunDefaults(epochs=10, batch_size=16, learning_rate=1e-3)

    def start(self, context: Context) -> NPOObjective:
        """Makes the weights trainable and scores the forget rows once as reference."""
        return NPOObjective(self, context)


class NPOObjective(GradientObjective):
    """NPO at work on one model."""

    def __init__(self, settings: NPO, context: Context) -> None:
        super().__init__(settings, context)
        self._beta, self._weight = settings.beta, settings.retain_weight
        # The model is its own reference before the first step, so one pass replaces a second model.
        self._reference = self.log_probs_before(context, context.forget, "reference")[:, 0]

    def forget_size(self, batch: Batch) -> int:
        """The forget term is a mean over rows."""
        return len(batch.examples)

    def loss(self, forget: Batch, retain: Batch | None) -> Terms:
        """Both terms of L."""
        log_prob = row_sums(*self.log_probs(forget))
        term = npo(log_prob, self._reference[list(forget.indices)], self._beta)
        return self.with_retain(term, retain, self._weight)
