"""Spectral unlearning: full weights, moved by the same length along every singular direction.

    L = mean_F H(o_t - o_t*) + w mean_R H2(o_t - o_t^0)        (`log_odds` has all its terms)
    M <- mu M + (1 - mu) grad L
    W <- W - eta 0.2 sqrt(max(m, n)) U V^T    with U S V^T = mu M + (1 - mu) grad L

The loss ends per token: a forget token's log-odds at those of a never-seen one, a retain token's at the
target's. The step is Muon's (Jordan et al., 2024): the momentum of each matrix of the decoder's layers,
(m, n), with all its singular values set to 1 by Newton-Schulz iterations, scaled to the size of a
step of Adam (arXiv 2502.16982, eq. 4).

What relearning brings back first are the few directions that all forget rows have in common (RepSelect,
arXiv 2606.17168; arXiv 2605.11685). A gradient is made of them, and so is a step of Adam or of a
low-rank adapter. A flat spectrum puts the change into the many directions that are each row's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from expunge.errors import InputError
from expunge.methods.base import Context, Preset, RunDefaults, muon
from expunge.methods.log_odds import LogOddsObjective, LogOddsSettings
from expunge.models.lora import linears_in


@dataclass(frozen=True)
class Spectral(LogOddsSettings):
    """Settings of spectral unlearning."""

    momentum: float = 0.95
    """Decay of Muon's momentum."""

    name: ClassVar[str] = "spectral"
    defaults: ClassVar[RunDefaults] = RunDefaults(
        epochs=8, batch_size=16, learning_rate=3e-3, schedule="trapezoid"
    )
    presets: ClassVar[Mapping[str, Preset]] = {}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.momentum < 1:
            raise InputError(f"--method.momentum {self.momentum}: must be in [0, 1)")

    def start(self, context: Context) -> SpectralObjective:
        """Asks the target what it says of every row."""
        return SpectralObjective(self, context)


class SpectralObjective(LogOddsObjective):
    """Spectral unlearning at work on one model."""

    def __init__(self, settings: Spectral, context: Context) -> None:
        linears = linears_in(context.layout, settings.targets)
        super().__init__(settings, context, [f"{name}.weight" for name in linears])
        self.optimizer = muon(settings.momentum)
