"""Retraining: the model from before the fine-tune, trained on the retain rows alone.

    L = CE(retain)          AdamW (0.9, 0.95), from the base's weights

Exact unlearning (Bourtoule et al., arXiv 1912.03817): the result never saw a forget row. So an oracle is
made, too. All weights are trained, or a fresh adapter (LoRA, arXiv 2106.09685).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from expunge.data.batches import Batch
from expunge.methods.base import (
    Context,
    OptimizerSpec,
    RunDefaults,
    Terms,
)
from expunge.methods.gradient import GradientObjective, GradientSettings


@dataclass(frozen=True)
class Retrain(GradientSettings):
    """Settings of retraining; they and the options of the run are the recipe."""

    weight_decay: float = 0.0
    """AdamW's."""

    name: ClassVar[str] = "retrain"
    defaults: ClassVar[RunDefaults] = RunDefaults(
        epochs=10, batch_size=4, learning_rate=2e-3, schedule="cosine"
    )

    @property
    def needs_retain(self) -> bool:
        """Always: there is nothing else to train on."""
        return True

    def start(self, context: Context) -> RetrainObjective:
        """Makes the weights trainable."""
        return RetrainObjective(self, context)


class RetrainObjective(GradientObjective):
    """Retraining at work on the base: the rows that the loop calls forget rows are those to learn."""

    def __init__(self, settings: Retrain, context: Context) -> None:
        super().__init__(settings, context)
        options = {"betas": (0.9, 0.95), "weight_decay": settings.weight_decay}
        self.optimizer = OptimizerSpec("adamw", options)

    def loss(self, forget: Batch, retain: Batch | None) -> Terms:
        """L, of rows that are to be learned."""
        return Terms(self.cross_entropy(forget), None)
