"""KL minimisation: raise the loss of forget text, keep retain text's next-token distributions.

    L = -CE(forget) + w * KL(p_before || p) on retain text

Maini et al., arXiv 2401.06121 (TOFU), section 4; a baseline of SemEval-2025 Task 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from expunge.data.batches import Batch
from expunge.methods.base import Context, RunDefaults, Terms
from expunge.methods.gradient import GradientObjective, GradientSettings


@dataclass(frozen=True)
class KLMinimization(GradientSettings):
    """Settings of KL minimisation."""

    retain_weight: float = 1.0
    """Weight of the retain term."""

    name: ClassVar[str] = "kl-minimization"
    defaults: ClassVar[RunDefaults] = RunDefaults(epochs=5, batch_size=16, learning_rate=1e-3)

    def start(self, context: Context) -> KLMinimizationObjective:
        """Makes the weights trainable and keeps the reference."""
        return KLMinimizationObjective(self, context)


class KLMinimizationObjective(GradientObjective):
    """KL minimisation at work on one model."""

    def __init__(self, settings: KLMinimization, context: Context) -> None:
        super().__init__(settings, context, needs_reference=settings.retain_weight > 0)
        self._weight = settings.retain_weight

    def loss(self, forget: Batch, retain: Batch | None) -> Terms:
        """Both terms of L."""
        ascent = -self.cross_entropy(forget)
        if retain is None or self._weight == 0:
            return Terms(ascent, None)
        drift = self.drift(retain)
        return Terms(ascent, self._weight * drift.sum() / max(1, len(drift)))
