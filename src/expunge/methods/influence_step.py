"""Phase 1 of LIBU: one step of an influence function along an adapter, its size checked on the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from expunge.data.tokenization import Example
from expunge.errors import RunError
from expunge.methods.base import Context
from expunge.methods.fisher import SquaredGradients
from expunge.methods.gradient import GradientObjective
from expunge.methods.influence import predicted_rise, removal_step, size_within
from expunge.methods.numerics import row_means

if TYPE_CHECKING:
    from expunge.methods.libu import LIBU

_HALVINGS = 12
_PROBE_ROWS = 64


class InfluenceStep:
    """The diagonal Fisher and the step that it allows, of one objective's adapter."""

    def __init__(self, objective: GradientObjective, context: Context) -> None:
        self._objective = objective
        self._context = context
        self._probe = [e for e in context.retain if e.listed][:_PROBE_ROWS]

    def diagonal_fisher(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Mean over examples of T * (gradient of the mean loss of its T tokens)^2, by parameter.

        With tokens' gradients uncorrelated this is the mean squared gradient per token, so that
        d^T F d / 2 predicts the rise of the mean token loss.
        """
        assert self._objective.adapter is not None
        squares = SquaredGradients(self._objective.adapter.factors())
        for batch in self._context.passes(examples, "Fisher"):
            with squares.collecting(len(batch.row_ids)), self._context.autocast():
                log_probs, mask = self._objective.log_probs(batch)
                loss = -(row_means(log_probs, mask) * mask.sum(1).float().sqrt()).sum()
                loss.backward()
        self._clear_gradients()
        return squares.mean()

    def forget_gradient(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Gradient of the mean token loss over all examples, by parameter."""
        tokens = 0
        for batch in self._context.passes(examples, "forget gradient"):
            with self._context.autocast():
                log_probs, mask = self._objective.log_probs(batch)
                torch.where(mask, -log_probs, 0.0).sum().backward()
            tokens += int(mask.sum())
        gradient = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.div_(max(1, tokens))
            for name, p in self._objective.parameters.items()
        }
        self._clear_gradients()
        return gradient

    def take(
        self,
        settings: LIBU,
        gradient: Mapping[str, torch.Tensor],
        fisher: Mapping[str, torch.Tensor],
    ) -> dict[str, float]:
        """Moves the parameters and returns the figures of the step.

        Raises RunError where no step size follows from the curvature.
        """
        entries = sum(f.numel() for f in fisher.values())
        mean_fisher = sum(float(f.sum()) for f in fisher.values()) / entries
        damping = settings.damping * (mean_fisher if settings.damping_unit == "mean-fisher" else 1)
        step = {name: removal_step(gradient[name], fisher[name], damping) for name in gradient}
        rise = sum(float(predicted_rise(step[name], fisher[name])) for name in step)
        if not math.isfinite(rise) or rise <= 0:
            raise RunError(
                f"LIBU phase 1: the predicted rise along its step is {rise:.3g}, no step size"
                " follows; set --method.damping higher or use --dtype float32"
            )
        size = settings.step_size
        halvings = 0
        before = self._retain_loss()
        start = {name: p.detach().clone() for name, p in self._objective.parameters.items()}
        sign = 1 if settings.direction == "remove" else -1
        if size is not None:
            self._move(start, step, sign * size)
            after = self._retain_loss()
        else:
            size = size_within(settings.step_budget, rise)
            self._move(start, step, sign * size)
            while (after := self._retain_loss()) - before > settings.step_budget:
                # The quadratic model holds near the start only, so its answer is checked.
                halvings += 1
                size = size / 2 if halvings <= _HALVINGS else 0.0
                self._move(start, step, sign * size)
        return {
            "mean_fisher": mean_fisher,
            "damping": damping,
            "step_size": size,
            "predicted_retain_rise": size**2 * rise,
            "measured_retain_rise": after - before,
            "halvings": halvings,
        }

    def _move(
        self, start: Mapping[str, torch.Tensor], step: Mapping[str, torch.Tensor], size: float
    ) -> None:
        with torch.no_grad():
            for name, parameter in self._objective.parameters.items():
                parameter.copy_(start[name] + size * step[name])

    def _retain_loss(self) -> float:
        total = tokens = 0.0
        for batch in self._context.passes(self._probe, None):
            with torch.no_grad(), self._context.autocast():
                log_probs, mask = self._objective.log_probs(batch)
            total -= float(torch.where(mask, log_probs, 0.0).sum())
            tokens += float(mask.sum())
        return total / max(1.0, tokens)

    def _clear_gradients(self) -> None:
        for parameter in self._objective.parameters.values():
            parameter.grad = None
