"""SatImp: gradient ascent with token weights for saturation and for importance.

    L = mean_F p^beta1 (1 - p)^beta2 log p + w * CE(retain)

p is a token's probability; no gradient runs through the weights. p^beta1 leaves alone what is gone
(saturation), (1 - p)^beta2 what the model is sure of (importance). Yang et al., arXiv 2505.11953,
section 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from expunge.data.batches import Batch
from expunge.errors import InputError
from expunge.methods.base import Context, Preset, RunDefaults, Terms
from expunge.methods.gradient import GradientObjective, GradientSettings
from expunge.methods.losses import weighted_ascent


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
    presets: ClassVar[Mapping[str, Preset]] = {}

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("beta1", "beta2"):
            if getattr(self, option) < 0:
                raise InputError(f"--method.{option} {getattr(self, option)}: must be 0 or more")

    def start(self, context: Context) -> SatImpObjective:
        """Makes the weights trainable."""
        return SatImpObjective(self, context)


class SatImpObjective(GradientObjective):
    """SatImp at work on one model."""

    def __init__(self, settings: SatImp, context: Context) -> None:
        super().__init__(settings, context)
        self._exponents, self._weight = (settings.beta1, settings.beta2), settings.retain_weight

    def loss(self, forget: Batch, retain: Batch | None) -> Terms:
        """Both terms of L."""
        ascent = weighted_ascent(*self.log_probs(forget), *self._exponents)
        return self.with_retain(ascent, retain, self._weight)
