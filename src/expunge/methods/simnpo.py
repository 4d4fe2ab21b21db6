"""SimNPO: NPO without a reference, on each row's mean log-probability.

    L = -(2 / beta) * mean_F log sigmoid(-beta * mean_t log pi - gamma) + w * CE(retain)

Fan et al., arXiv 2410.07163, eq. 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from expunge.data.batches import Batch
from expunge.maths.losses import simnpo
from expunge.maths.numerics import row_means
from expunge.methods.base import Context, RunDefaults, Terms
from expunge.methods.gradient import GradientObjective, GradientSettings


@dataclass(frozen=True)
class SimNPO(GradientSettings):
    """Settings of SimNPO."""

    beta: float = 2.5
    """Sharpness of the sigmoid."""
    gamma: float = 0.0
    """Margin by which a row's log-probability must fall."""
    retain_weight: float = 1.0
    """Weight of the retain term."""

    name: ClassVar[str] = "simnpo"
    defaults: ClassVar[RunDefaults] = RunDefaults(epochs=10, batch_size=16, learning_rate=1e-3)

    def start(self, context: Context) -> SimNPOObjective:
        """Makes the weights trainable."""
        return SimNPOObjective(self, context)


class SimNPOObjective(GradientObjective):
    """SimNPO at work on one model."""

    _settings: SimNPO

    def forget_size(self, batch: Batch) -> int:
        """The forget term is a mean over rows."""
        return len(batch.examples)

    def loss(self, forget: Batch, retain: Batch | None) -> Terms:
        """Both terms of L."""
        settings = self._settings
        term = simnpo(row_means(*self.log_probs(forget)), settings.beta, settings.gamma)
        return self.with_retain(term, retain, settings.retain_weight)
