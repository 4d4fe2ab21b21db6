"""UNDIAL: distil the target, with the logit of each forget token lowered, into the model.

    L = mean_F KL(softmax(z_before - strength * onehot(token)) || p) + w * CE(retain)

What the target would say beside the token is kept, so the model ends at a distribution and not without
end. Dong et al., arXiv 2402.10052; the paper's cross-entropy has the same gradient, and w is 0 there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from expunge.data.batches import Batch
from expunge.maths.losses import lowered, token_kl
from expunge.methods.base import Context, RunDefaults, Terms
from expunge.methods.gradient import GradientObjective, GradientSettings


@dataclass(frozen=True)
class UNDIAL(GradientSettings):
    """Settings of UNDIAL."""

    strength: float = 10.0
    """What each forget token's logit is lowered by; the paper has 3, 10 and 30."""
    retain_weight: float = 1.0
    """Weight of the retain term; the paper holds no retain text."""

    name: ClassVar[str] = "undial"
    defaults: ClassVar[RunDefaults] = RunDefaults(epochs=10, batch_size=16, learning_rate=1e-3)

    def start(self, context: Context) -> UNDIALObjective:
        """Makes the weights trainable and keeps the reference."""
        return UNDIALObjective(self, context)


class UNDIALObjective(GradientObjective):
    """UNDIAL at work on one model."""

    def __init__(self, settings: UNDIAL, context: Context) -> None:
        super().__init__(settings, context, needs_reference=True)
        self._strength, self._weight = settings.strength, settings.retain_weight

    def loss(self, forget: Batch, retain: Batch | None) -> Terms:
        """Both terms of L."""
        targets = forget.input_ids[:, 1:][forget.mask(self._tokens)[:, 1:]]
        with self.reference():
            wanted = lowered(self.counted_logits(forget), targets, self._strength)
        away = token_kl(self.counted_logits(forget), wanted)
        return self.with_retain(away.sum() / max(1, len(away)), retain, self._weight)
