"""Gradient ascent: raise the loss of forget text, with nothing to hold the rest.

    L = -CE(forget)

Jang et al., arXiv 2210.01504. Unbounded: the run is saved by its checkpoint choice or not at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from expunge.data.batches import Batch
from expunge.methods.base import Context, RunDefaults, Terms
from expunge.methods.gradient import GradientObjective, GradientSettings


@dataclass(frozen=True)
class GradientAscent(GradientSettings):
    """Settings of gradient ascent."""

    name: ClassVar[str] = "gradient-ascent"
    defaults: ClassVar[RunDefaults] = RunDefaults(epochs=5, batch_size=16, learning_rate=1e-3)

    def start(self, context: Context) -> GradientAscentObjective:
        """Makes the weights trainable."""
        return GradientAscentObjective(self, context)


class GradientAscentObjective(GradientObjective):
    """Gradient ascent at work on one model."""

    def loss(self, forget: Batch, retain: Batch | None) -> Terms:
        """The negative loss of forget text; retain text is not used."""
        ascent = -self.cross_entropy(forget)
        return Terms(ascent, None)
