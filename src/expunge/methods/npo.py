"""NPO: negative preference optimisation, a bounded ascent relative to the model from before.

    L = (2 / beta) * mean_F log(1 + (pi / pi_ref)^beta) + w * CE(retain)

Zhang et al., arXiv 2404.05868, eq. 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from expunge.data.batches import Batch, in_order
from expunge.methods.base import Context, Preset, RunDefaults, Terms
from expunge.methods.gradient import GradientObjective, GradientSettings
from expunge.methods.losses import npo
from expunge.methods.numerics import row_sums


@dataclass(frozen=True)
class NPO(GradientSettings):
    """Settings of NPO."""

    beta: float = 0.1
    """Sharpness: towards 0 this becomes gradient ascent."""
    retain_weight: float = 1.0
    """Weight of the retain term."""

    name: ClassVar[str] = "npo"
    defaults: ClassVar[RunDefaults] = RunDefaults(epochs=10, batch_size=16, learning_rate=1e-3)
    presets: ClassVar[Mapping[str, Preset]] = {}

    def start(self, context: Context) -> NPOObjective:
        """Makes the weights trainable and scores the forget rows once as reference."""
        return NPOObjective(self, context)


class NPOObjective(GradientObjective):
    """NPO at work on one model."""

    def __init__(self, settings: NPO, context: Context) -> None:
        super().__init__(settings, context)
        self._beta, self._weight = settings.beta, settings.retain_weight
        # The model is its own reference before the first step, so one pass replaces a second model.
        self._reference = torch.zeros(len(context.forget), device=context.device)
        done = 0
        for batch in in_order(context.forget, context.batch_size, context.pad_id):
            with torch.no_grad(), context.autocast():
                sums = row_sums(*self.log_probs(batch.to(context.device)))
            self._reference[list(batch.indices)] = sums
            done += len(batch.indices)
            context.progress("reference", done, len(context.forget))

    def forget_size(self, batch: Batch) -> int:
        """The forget term is a mean over rows."""
        return len(batch.examples)

    def loss(self, forget: Batch, retain: Batch | None) -> Terms:
        """Both terms of L."""
        log_prob = row_sums(*self.log_probs(forget))
        term = npo(log_prob, self._reference[list(forget.indices)], self._beta)
        return self.with_retain(term, retain, self._weight)
