"""Adaptive RMU: steer hidden states of forget text away, hold those of retain text in place.

    L = mean_F || h_l(x) - beta * ||h_l_frozen(x)|| * u ||^2 / d
        + alpha * mean_R || h_l(x) - h_l_frozen(x) ||^2 / d

with h_l the output of decoder layer l (from 0), u a random unit direction and d the width. Means are
over tokens, in forget rows weighted by their row's size ** -row_balance. Only the MLP output
projections of layers l-2, l-1 and l are trained. Dang et al., arXiv 2408.06223; at SemEval-2025 Task
4 arXiv 2506.16548. The norm is the frozen model's own, per token: the SemEval code takes it from the
updated model, whose norms then grow by up to beta an epoch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from expunge.data.batches import Batch
from expunge.errors import InputError
from expunge.methods.base import Context, Preset, RunDefaults, Terms
from expunge.methods.losses import adaptive_target, unit_direction
from expunge.methods.steering import SteeringObjective, SteeringSettings

_SEMEVAL = "github.com/ArjunDosajh/Mr.Snuffleupagus-SemEval-2025-Task-4 (arXiv 2506.16548)"

_PUBLISHED = {
    "direction_kind": "uniform",
    "forget_tokens": "all",
    "row_balance": 0.0,
    "random_rows": 0,
    "calibration_gain": 0.0,
    "optimizer": "adamw",
}
_SEMEVAL_SETTINGS = {**_PUBLISHED, "alpha": 900.0, "directions": "per-task"}


@dataclass(frozen=True)
class AdaptiveRMU(SteeringSettings):
    """Settings of Adaptive RMU."""

    beta: float = 5.0
    """Length of the target in units of the frozen hidden state's norm."""
    directions: Literal["shared", "per-task"] = "shared"
    """One random direction for all forget text, or one for each task as at SemEval; a shared one is
    learned in fewer steps."""

    name: ClassVar[str] = "adaptive-rmu"
    defaults: ClassVar[RunDefaults] = RunDefaults(
        epochs=30, batch_size=16, learning_rate=8e-3, schedule="cosine"
    )
    presets: ClassVar[Mapping[str, Preset]] = {
        "semeval-7b": Preset(
            {**_SEMEVAL_SETTINGS, "layer": 26, "beta": 5.0},
            {
                "batch_size": 12,
                "learning_rate": 5e-5,
                "time_limit": "1h",
                "epochs": 1000,
                "schedule": "constant",
            },
            _SEMEVAL,
        ),
        "semeval-1b": Preset(
            {**_SEMEVAL_SETTINGS, "layer": 14, "beta": 3.0},
            {
                "batch_size": 8,
                "learning_rate": 5e-5,
                "time_limit": "1h",
                "epochs": 1000,
                "schedule": "constant",
            },
            _SEMEVAL,
        ),
        "original": Preset(
            {
                "layer": 7,
                "beta": 5.0,
                "alpha": 1200.0,
                **_PUBLISHED,
                "directions": "shared",
            },
            {
                "batch_size": 4,
                "learning_rate": 5e-5,
                "max_steps": 500,
                "epochs": 1000,
                "schedule": "constant",
            },
            "arXiv 2408.06223, zephyr-7b",
        ),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta < 0:
            raise InputError(f"--method.beta {self.beta}: must be 0 or more")

    def draw_directions(self, context: Context) -> dict[str, torch.Tensor]:
        """The direction of each task of the forget set, (width,), of unit norm."""
        tasks = sorted({example.task for example in context.forget})
        generator = context.generator("direction")
        width = context.model.config.hidden_size
        directions: dict[str, torch.Tensor] = {}
        for task in tasks:
            if self.directions == "shared" and directions:
                directions[task] = directions[tasks[0]]
                continue
            drawn = unit_direction(width, self.direction_kind, generator)
            directions[task] = drawn.to(context.device)
        return directions

    def start(self, context: Context) -> AdaptiveRMUObjective:
        """Draws the directions and keeps a copy of the trained weights as reference."""
        return AdaptiveRMUObjective(self, context)


class AdaptiveRMUObjective(SteeringObjective):
    """Adaptive RMU at work on one model."""

    def __init__(self, settings: AdaptiveRMU, context: Context) -> None:
        super().__init__(settings, context)
        self._beta = settings.beta
        self.directions = settings.draw_directions(context)

    def loss(self, forget: Batch, retain: Batch | None) -> Terms:
        """The two terms of L."""
        directions = torch.stack([self.directions[task] for task in forget.tasks])
        lengths = torch.tensor(forget.lengths, device=directions.device)
        per_token = directions.repeat_interleave(lengths, dim=0)
        target = adaptive_target(self.hidden.norms_before(forget), per_token, self._beta)
        return self.terms(forget, self.weakened(target, forget), retain)

    def artifacts(self) -> Mapping[str, torch.Tensor]:
        """The directions, by task."""
        return {
            # A copy each: a safetensors file refuses one storage under two names.
            f"direction.{task}": vector.to("cpu", copy=True)
            for task, vector in self.directions.items()
        }
