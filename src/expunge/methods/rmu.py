"""RMU: steer hidden states of forget text toward one fixed vector.

    L = mean_F || h_l(x) - c * u ||^2 / d + alpha * mean_R || h_l(x) - h_l_frozen(x) ||^2 / d

with a constant c for every token. Li et al., arXiv 2403.03218, eq. 1 to 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from expunge.data.batches import Batch, Tokens
from expunge.maths.losses import unit_direction
from expunge.methods.base import Context, Preset, RunDefaults, Terms
from expunge.methods.steering import SteeringObjective, SteeringSettings


@dataclass(frozen=True)
class RMU(SteeringSettings):
    """Settings of RMU."""

    forget_tokens: Tokens = "all"
    """Which tokens' states are steered in forget rows: all of them, or those that predict a counted
    token."""
    row_balance: float = 0.0
    """From 0, every token of the forget rows counts alike as published, to 1, every row does."""
    random_rows: int = 0
    """Rows of random tokens that are held as retain rows are. They are not in the paper."""
    calibration_gain: float = 0.0
    """How far a row's strength moves for a loss that is wrong by that of a non-member. It needs
    non-members, and is not in the paper; 0 steers every row all the way."""
    optimizer: Literal["muon", "adamw"] = "adamw"
    """Optimiser of the projections; AdamW as published."""
    coefficient: float = 20.0
    """Length c of the target, in units of activation."""

    name: ClassVar[str] = "rmu"
    defaults: ClassVar[RunDefaults] = RunDefaults(
        epochs=25, batch_size=16, learning_rate=8e-3, schedule="cosine"
    )
    presets: ClassVar[Mapping[str, Preset]] = {
        "original": Preset(
            {"layer": 7, "coefficient": 6.5, "alpha": 1200.0, "direction_kind": "uniform"},
            {
                "batch_size": 4,
                "learning_rate": 5e-5,
                "max_steps": 150,
                "epochs": 1000,
                "schedule": "constant",
            },
            "arXiv 2403.03218, zephyr-7b",
        ),
    }

    def start(self, context: Context) -> RMUObjective:
        """Draws the direction and keeps a copy of the trained weights as reference."""
        return RMUObjective(self, context)


class RMUObjective(SteeringObjective):
    """RMU at work on one model."""

    def __init__(self, settings: RMU, context: Context) -> None:
        super().__init__(settings, context)
        self.direction = unit_direction(
            context.layout.width,
            settings.direction_kind,
            context.generator("direction"),
        ).to(context.device)
        self._target = settings.coefficient * self.direction

    def loss(self, forget: Batch, retain: Batch | None) -> Terms:
        """The two terms of L."""
        return self.terms(forget, self.weakened(self._target, forget), retain)

    def artifacts(self) -> Mapping[str, torch.Tensor]:
        """The direction."""
        return {"direction": self.direction.cpu()}
