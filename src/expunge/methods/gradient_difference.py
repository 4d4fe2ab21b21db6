"""Gradient difference: raise the loss of forget text, lower that of retain text.

    L = -CE(forget) + w * CE(retain)

Liu et al., arXiv 2203.12817; a baseline of SemEval-2025 Task 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from expunge.data.batches import Batch
from expunge.methods.base import Context, RunDefaults, Terms
from expunge.methods.gradient import GradientObjective, GradientSettings


@dataclass(frozen=True)
class GradientDifference(GradientSettings):
    """Settings of gradient difference."""

    retain_weight: float = 1.0
    """Weight of the retain term."""

    name: ClassVar[str] = "gradient-difference"
    defaults: ClassVar[RunDefaults] = RunDefaults(epochs=5, batch_size=16, learning_rate=1e-3)

    def start(self, context: Context) -> GradientDifferenceObjective:
        """Makes the weights trainable."""
        return GradientDifferenceObjective(self, context)


class GradientDifferenceObjective(GradientObjective):
    """Gradient difference at work on one model."""

    _settings: GradientDifference

    def loss(self, forget: Batch, retain: Batch | None) -> Terms:
        """Both terms of L."""
        ascent = -self.cross_entropy(forget)
        return self.with_retain(ascent, retain, self._settings.retain_weight)
