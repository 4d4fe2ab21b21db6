"""Token-wise NPO: every forget token against itself in the target, retain text held in two ways.

    L = (2 / beta) * mean_t log(1 + (pi_t / pi_ref,t)^beta) + w * CE(retain) + v * KL(target || model)

over forget tokens t, on a small adapter; the target is the model with the adapter off. Bronec and
Helcl (Atyaephyra at SemEval-2025 Task 4), arXiv 2503.13690. NPO on whole rows (arXiv 2404.05868) stops
pushing a long row once a few of its tokens are gone; token by token each is pushed until it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from expunge.data.batches import Batch
from expunge.maths.losses import token_npo
from expunge.methods.base import Context, Preset, RunDefaults, Terms
from expunge.methods.gradient import GradientObjective, GradientSettings


@dataclass(frozen=True)
class TokenNPO(GradientSettings):
    """Settings of token-wise NPO."""

    rank: int = 8
    """Rank of the adapter."""
    lora_alpha: float = 8.0
    """The adapter's product is scaled by lora_alpha / rank."""
    beta: float = 0.5
    """Sharpness: towards 0 this becomes gradient ascent."""
    retain_weight: float = 1.0
    """Weight of the cross-entropy of retain text."""
    kl_weight: float = 0.5
    """Weight of the divergence from the target's predictions on retain text."""

    name: ClassVar[str] = "token-npo"
    defaults: ClassVar[RunDefaults] = RunDefaults(epochs=20, batch_size=16, learning_rate=4e-3)
    presets: ClassVar[Mapping[str, Preset]] = {
        "semeval": Preset(
            {
                "rank": 2,
                "lora_alpha": 2.0,
                "targets": "attention",
                "tokens": "answer",
                "beta": 0.5,
                "retain_weight": 1.0,
                "kl_weight": 0.5,
            },
            # There four rows of both sides together, Adam and no clipping.
            {"learning_rate": 2e-5, "epochs": 40, "batch_size": 2, "schedule": "constant"},
            "arXiv 2503.13690, github.com/XelfXendr/peft_unlearning"
            " semeval/submissions/submission_05.py; there on the maps of queries and values, here on"
            " all of attention",
        ),
    }

    @property
    def needs_retain(self) -> bool:
        """Unless both weights are 0."""
        return self.retain_weight > 0 or self.kl_weight > 0

    def start(self, context: Context) -> TokenNPOObjective:
        """Makes the weights trainable and keeps the reference."""
        return TokenNPOObjective(self, context)


class TokenNPOObjective(GradientObjective):
    """Token-wise NPO at work on one model."""

    _settings: TokenNPO

    def __init__(self, settings: TokenNPO, context: Context) -> None:
        super().__init__(settings, context, needs_reference=True)

    def loss(self, forget: Batch, retain: Batch | None) -> Terms:
        """Both sides of L."""
        settings = self._settings
        log_probs, mask = self.log_probs(forget)
        with self.reference():
            before, _ = self.log_probs(forget)
        term = token_npo(log_probs, before, mask, settings.beta)
        if retain is None or not settings.needs_retain:
            return Terms(term, None)
        return Terms(term, self.held(retain, settings.retain_weight, settings.kl_weight))
