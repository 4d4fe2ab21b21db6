"""LIBU as its paper has it (arXiv 2506.04044), for replication: Sophia on the adapter, plain losses.

Phase 1 is that of `libu`, its size given or found. Phase 2, Sophia (arXiv 2305.14342) on

    L = -CE(forget) + w * CE(retain)

with Sophia-G's curvature: the mean squared gradient of the retain loss on labels sampled from the model.
As published both phases descend on the forget loss and there is no retain term, which strengthens the
memory; `direction: as-published` repeats that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from expunge.data.batches import Batch
from expunge.errors import InputError
from expunge.maths.curvature import DiagonalCurvature
from expunge.maths.numerics import target_log_probs
from expunge.methods.base import Context, OptimizerSpec, Preset, RunDefaults, Terms
from expunge.methods.gradient import GradientObjective, LoraSettings
from expunge.methods.influence_step import InfluenceStep

_SETUP = {"batch_size": 16, "epochs": 5, "schedule": "constant"}


@dataclass(frozen=True)
class PublishedLIBU(LoraSettings):
    """Settings of LIBU as published."""

    direction: Literal["remove", "as-published"] = "remove"
    """Remove the influence of forget rows, or descend on their loss as the published code does."""
    damping: float = 1e-3
    """lambda, what is added to the Fisher before it is inverted."""
    step_size: float | None = None
    """Phase 1 step size s; null: the largest that raises the retain loss by 0.02 nats a token."""
    retain_weight: float = 2.0
    """Weight of the retain set's cross-entropy."""
    gamma: float = 1.0
    """Sophia divides the momentum by gamma times the curvature."""
    rho: float = 0.04
    """Sophia clips each element of its step here; times the learning rate it bounds the step."""
    curvature_interval: int = 10
    """Steps between two estimates of the curvature."""

    name: ClassVar[str] = "libu-published"
    defaults: ClassVar[RunDefaults] = RunDefaults(
        epochs=5, batch_size=16, learning_rate=2e-5, schedule="constant"
    )
    presets: ClassVar[Mapping[str, Preset]] = {
        "setup-2": Preset(
            {"rank": 16, "lora_dropout": 0.05, "targets": "attention"},
            {**_SETUP, "learning_rate": 3e-5},
            "arXiv 2506.04044 setup 2, lr between those of setups 1 and 3; remove direction",
        ),
        "setup-3": Preset(
            {"rank": 16, "lora_dropout": 0.05, "targets": "attention"},
            {**_SETUP, "learning_rate": 2e-5},
            "arXiv 2506.04044 setup 3, the paper's best; remove direction",
        ),
        "as-published": Preset(
            {
                "rank": 16,
                "lora_dropout": 0.05,
                "targets": "attention",
                "direction": "as-published",
                "step_size": 2e-5,
                "retain_weight": 0.0,
            },
            {**_SETUP, "learning_rate": 2e-5},
            "arXiv 2506.04044 setup 3 with the sign and the missing retain term of the published"
            " code: for replication, it does not unlearn",
        ),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("damping", "gamma", "rho", "curvature_interval", "step_size"):
            value = getattr(self, option)
            if value is not None and value <= 0:
                raise InputError(f"--method.{option} {value}: must be positive")

    @property
    def needs_retain(self) -> bool:
        """Always: the Fisher is the retain set's."""
        return True

    def start(self, context: Context) -> PublishedLIBUObjective:
        """Attaches the adapter and takes the step of phase 1."""
        return PublishedLIBUObjective(self, context)


class PublishedLIBUObjective(GradientObjective):
    """The published LIBU at work on one model; phase 1 is done when this is constructed."""

    _settings: PublishedLIBU

    def __init__(self, settings: PublishedLIBU, context: Context) -> None:
        super().__init__(settings, context)
        self._context = context
        self.optimizer = OptimizerSpec(
            "sophia",
            {"gamma": settings.gamma, "rho": settings.rho, "betas": (0.9, 0.999)},
            settings.curvature_interval,
        )
        self.fisher: Mapping[str, torch.Tensor] = {}
        if context.resumed is None:
            self._phase_1 = self._taken()
        else:  # the adapter and the curvature are put back
            self._phase_1 = context.resumed["phase_1"]

    def _taken(self) -> Mapping[str, Any]:
        assert self.adapter is not None
        settings, context = self._settings, self._context
        step = InfluenceStep(self, context)
        self.fisher = step.diagonal_fisher([e for e in context.retain if e.listed])
        gradient = step.forget_gradient(context.forget)
        moved = {name: gradient[name] for name in self.adapter.moves_first}
        return step.take(
            moved,
            DiagonalCurvature(self.fisher, settings.damping),
            size=settings.step_size,
            sign=1 if settings.direction == "remove" else -1,
        )

    def loss(self, forget: Batch, retain: Batch | None) -> Terms:
        """Phase 2's loss; as published, the forget loss itself."""
        sign = -1 if self._settings.direction == "remove" else 1
        return self.with_retain(sign * self.cross_entropy(forget), retain, self._settings.retain_weight)

    def curvature(self, batch: Batch) -> list[torch.Tensor]:
        """Gauss-Newton-Bartlett: tokens * (gradient of the loss on labels sampled from the model)^2."""
        with self._context.autocast():
            logits = self.counted_logits(batch)
            with torch.no_grad():
                # Drawn on the CPU, so that a GPU's run has the labels of a processor's.
                probabilities = logits.detach().float().softmax(-1).cpu()
                sampled = torch.multinomial(probabilities, 1)[:, 0].to(logits.device)
            loss = -target_log_probs(logits, sampled).sum() / max(1, len(sampled))
        gradients = torch.autograd.grad(loss, list(self.parameters.values()))
        return [len(sampled) * gradient.float().square() for gradient in gradients]

    def initial_curvature(self) -> list[torch.Tensor] | None:
        """Phase 1's Fisher, so that the first steps are not sign-momentum; a resumed run has its own."""
        return [self.fisher[name] for name in self.parameters] if self.fisher else None

    def notes(self) -> Mapping[str, Any]:
        """The measured figures of phase 1."""
        return {**super().notes(), "phase_1": self._phase_1}
