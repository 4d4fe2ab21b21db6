"""WGA: gradient ascent that pushes a token the less, the less likely it is already.

    L = mean_F p^alpha log p + w * CE(retain)

p is a token's probability; no gradient runs through p^alpha. The gradient of log p grows as 1 / p, so
plain ascent goes on pushing what is gone. Wang et al., arXiv 2502.19301.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from expunge.data.batches import Batch
from expunge.maths.losses import weighted_ascent
from expunge.methods.base import Context, RunDefaults, Terms
from expunge.methods.gradient import GradientObjective, GradientSettings


@dataclass(frozen=True)
class WGA(GradientSettings):
    """Settings of weighted gradient ascent."""

    alpha: float = 1.0
    """Exponent of the weights: at 0 this is gradient difference."""
    retain_weight: float = 1.0
    """Weight of the retain term."""

    name: ClassVar[str] = "wga"
    defaults: ClassVar[RunDefaults] = RunDefaults(epochs=10, batch_size=16, learning_rate=1e-3)

    def start(self, context: Context) -> WeightedAscentObjective:
        """Makes the weights trainable."""
        return WeightedAscentObjective(self, context, (self.alpha, 0.0), self.retain_weight)


class WeightedAscentObjective(GradientObjective):
    """Gradient ascent with token weights at work on one model."""

    def __init__(
        self,
        settings: GradientSettings,
        context: Context,
        exponents: tuple[float, float],
        retain_weight: float,
    ) -> None:
        """`exponents` are those of p and of 1 - p."""
        super().__init__(settings, context)
        self._exponents, self._weight = exponents, retain_weight

    def loss(self, forget: Batch, retain: Batch | None) -> Terms:
        """Both terms of L."""
        ascent = weighted_ascent(*self.log_probs(forget), *self._exponents)
        return self.with_retain(ascent, retain, self._weight)
