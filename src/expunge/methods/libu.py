"""LIBU: LoRA-enhanced influence-based unlearning, in two phases (arXiv 2506.04044).

Phase 1, one step of an influence function along the adapter:

    theta <- theta + s * w * g_forget,   w = 1 / (F + lambda)

with g_forget the gradient of the forget loss and F the diagonal Fisher of the retain set, or the same
in EK-FAC's eigenbasis. The sign removes: theta + H^-1 g_forget is the direction of the weights
trained without those rows (Koh and Liang, arXiv 1703.04730). The step size s is the largest whose
predicted rise of the retain loss, s^2/2 * sum(F d^2), stays in `step_budget`; it is halved until the
measured rise does too. A fresh adapter has B = 0, so the gradient of A is zero and phase 1 moves B only.

Phase 2 moves both factors by Muon on the loss of `log_odds`: a forget term that ends per token, and the
retain term that the published code lacks. `libu_published` has the paper's phase 2, for replication.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from expunge.errors import InputError
from expunge.maths.curvature import Curvature, DiagonalCurvature
from expunge.methods.base import Context, OptimizerSpec, RunDefaults
from expunge.methods.gradient import LoraSettings
from expunge.methods.influence_step import InfluenceStep
from expunge.methods.log_odds import LogOddsObjective, LogOddsSettings


@dataclass(frozen=True)
class LIBU(LogOddsSettings, LoraSettings):
    """Settings of LIBU."""

    step_budget: float = 0.02
    """Phase 1 may raise the retain loss by this many nats a token."""
    damping: float = 1.0
    """lambda of phase 1, in units of the Fisher's mean entry."""
    preconditioner: Literal["diagonal", "ekfac"] = "diagonal"
    """F in phase 1: the Fisher's diagonal, or EK-FAC, a diagonal in the eigenbasis of each factor
    of the adapter. EK-FAC takes two more passes over the retain set, and inputs^2 + outputs^2
    numbers a factor."""

    name: ClassVar[str] = "libu"
    defaults: ClassVar[RunDefaults] = RunDefaults(
        epochs=12,
        batch_size=16,
        learning_rate=6e-3,
        schedule="trapezoid",
        candidates=8,
        least_steps=64,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("damping", "step_budget"):
            if getattr(self, option) <= 0:
                raise InputError(f"--method.{option} {getattr(self, option)}: must be positive")

    @property
    def needs_retain(self) -> bool:
        """Always: the Fisher is the retain set's."""
        return True

    def start(self, context: Context) -> LIBUObjective:
        """Attaches the adapter and takes the step of phase 1."""
        return LIBUObjective(self, context)


class LIBUObjective(LogOddsObjective):
    """LIBU at work on one model; phase 1 is done when this is constructed."""

    optimizer = OptimizerSpec("muon", in_backward=True)

    def __init__(self, settings: LIBU, context: Context) -> None:
        super().__init__(settings, context)
        if context.resumed is None:
            self._phase_1 = self._removed(settings, context)
        else:  # the adapter is put back
            self._phase_1 = context.resumed["phase_1"]

    def _removed(self, settings: LIBU, context: Context) -> Mapping[str, Any]:
        """Takes the step along the adapter; its measured figures."""
        assert self.adapter is not None
        step = InfluenceStep(self, context)
        retained = [example for example in context.retain if example.listed]
        fisher = step.diagonal_fisher(retained)
        gradient = step.forget_gradient(context.forget)
        moved = {name: gradient[name] for name in self.adapter.moves_first}
        curvature: Curvature = DiagonalCurvature(fisher)
        damping = settings.damping * curvature.mean()
        if settings.preconditioner == "ekfac":
            curvature = step.ekfac(retained, moved)
        curvature.damping = damping
        return step.take(moved, curvature, budget=settings.step_budget)

    def notes(self) -> Mapping[str, Any]:
        """The measured figures of phase 1."""
        return {**super().notes(), "phase_1": self._phase_1}
