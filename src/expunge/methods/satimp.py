"""SatImp: gradient ascent with token weights for saturation and for importance.

    L = mean_F p^beta1 (1 - p)^beta2 log p + w * CE(retain)

p is a token's probability; no gradient runs through the weights. p^beta1 leaves alone what is gone
(saturation), (1 - p)^beta2 what the model is sure of (importance). Yang et al., arXiv 2505.11953,
section 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from expunge.methods.base import Context, RunDefaults
from expunge.methods.gradient import GradientSettings
from expunge.methods.wga import WeightedAscentObjective


@dataclass(frozen=True)
class SatImp(GradientSettings):
    """Settings of SatImp."""

    beta1: float = 5.0
    """Exponent of p, for saturation."""
    beta2: float = 1.0
    """Exponent of 1 - p, for importance: at 0 this is WGA."""
    retain_weight: float = 1.0
    """Weight of the retain term."""

    name: ClassVar[str] = "satimp"
    defaults: ClassVar[RunDefaults] = RunDefaults(epochs=10, batch_size=16, learning_rate=1e-3)

    def start(self, context: Context) -> WeightedAscentObjective:
        """Makes the weights trainable."""
        exponents = (self.beta1, self.beta2)
        return WeightedAscentObjective(self, context, exponents, self.retain_weight)
