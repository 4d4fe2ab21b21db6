"""Phase 1 of LIBU: one step of an influence function along an adapter, its size checked on the model.

Preconditioned by the retain set's Fisher as a diagonal, or by EK-FAC: a diagonal in the eigenbasis of
each factor's inputs and output gradients (arXiv 1806.03884, 2308.03296). There the gradients' main
directions are axes, so that a step along the others is dear to no retain row.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from expunge.data.batches import Batch
from expunge.data.tokenization import Example
from expunge.errors import RunError
from expunge.maths.curvature import Curvature, EigenbasisCurvature
from expunge.maths.fisher import FactorCovariances, SquaredGradients
from expunge.maths.influence import size_within
from expunge.maths.numerics import row_means
from expunge.methods.base import Context
from expunge.methods.gradient import GradientObjective

STEP_BUDGET = 0.02
"""Nats a token."""
_HALVINGS = 12
_PROBE_ROWS = 64


class InfluenceStep:
    """The Fisher and the step that it allows, of one objective's adapter."""

    def __init__(self, objective: GradientObjective, context: Context) -> None:
        self._objective = objective
        self._context = context
        self._probe = [e for e in context.retain if e.listed][:_PROBE_ROWS]
        self._forgotten = [e for e in context.forget if e.listed][:_PROBE_ROWS]

    def diagonal_fisher(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Mean over examples of T * (gradient of the mean loss of its T tokens)^2, by parameter.

        With tokens' gradients uncorrelated this is the mean squared gradient per token, so that
        d^T F d / 2 predicts the rise of the mean token loss.
        """
        squares = SquaredGradients(self._factors())
        for batch in self._context.passes(examples, "Fisher"):
            with squares.collecting(len(batch.row_ids)):
                self._backward(batch)
        return squares.mean()

    def ekfac(self, examples: Sequence[Example], names: Collection[str]) -> EigenbasisCurvature:
        """The same Fisher of the named parameters, as a diagonal in the eigenbasis of their factors.

        Two passes over the examples: for the bases and for the eigenvalues.
        """
        factors = [(name, factor) for name, factor in self._factors() if name in names]
        covariances = FactorCovariances(factors)
        for batch in self._context.passes(examples, "EK-FAC bases"):
            with covariances.collecting():
                self._backward(batch)
        bases = covariances.bases()
        squares = SquaredGradients(factors, bases)
        for batch in self._context.passes(examples, "EK-FAC"):
            with squares.collecting(len(batch.row_ids)):
                self._backward(batch)
        return EigenbasisCurvature(bases, squares.mean())

    def _factors(self) -> list[tuple[str, nn.Module]]:
        assert self._objective.adapter is not None
        return list(self._objective.adapter.factors())

    def _backward(self, batch: Batch) -> None:
        """One backward pass of sum_n sqrt(T_n) * (mean loss of the T_n tokens of example n)."""
        with self._context.autocast():
            log_probs, mask = self._objective.log_probs(batch)
            loss = -(row_means(log_probs, mask) * mask.sum(1).float().sqrt()).sum()
            loss.backward()
        self._clear_gradients()

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
        gradient: Mapping[str, torch.Tensor],
        curvature: Curvature,
        *,
        budget: float = STEP_BUDGET,
        size: float | None = None,
        sign: Literal[-1, 1] = 1,
    ) -> dict[str, float]:
        """Moves the parameters that `gradient` names and returns the figures of the step.

        `curvature`, damped, is what the gradient is divided by. Without a `size`, the step's is the
        largest that raises the retain loss by `budget` nats a token at most; `sign` 1 removes.
        Raises RunError where no step size follows from the curvature.
        """
        step = {name: curvature.solve(name, part) for name, part in gradient.items()}
        rise = sum(float(curvature.rise(name, part)) for name, part in step.items())
        forget_before = self._loss(self._forgotten)
        if not math.isfinite(rise) or rise <= 0:
            raise RunError(
                f"LIBU phase 1: the predicted rise along its step is {rise:.3g}, no step size"
                " follows; set --method.damping higher or use --dtype float32"
            )
        halvings = 0
        before = self._loss(self._probe)
        start = {name: p.detach().clone() for name, p in self._objective.parameters.items()}
        if size is not None:
            self._move(start, step, sign * size)
            after = self._loss(self._probe)
        else:
            size = size_within(budget, rise)
            self._move(start, step, sign * size)
            while (after := self._loss(self._probe)) - before > budget:
                # The quadratic model holds near the start only, so its answer is checked.
                halvings += 1
                size = size / 2 if halvings <= _HALVINGS else 0.0
                self._move(start, step, sign * size)
        return {
            "damping": curvature.damping,
            "step_size": size,
            "predicted_retain_rise": size**2 * rise,
            "measured_retain_rise": after - before,
            "measured_forget_rise": self._loss(self._forgotten) - forget_before,
            "halvings": halvings,
        }

    def _move(
        self, start: Mapping[str, torch.Tensor], step: Mapping[str, torch.Tensor], size: float
    ) -> None:
        with torch.no_grad():
            for name, direction in step.items():
                self._objective.parameters[name].copy_(start[name] + size * direction)

    def _loss(self, examples: Sequence[Example]) -> float:
        """Mean loss of the examples' counted tokens, in nats."""
        total = tokens = 0.0
        for batch in self._context.passes(examples, None):
            with torch.no_grad(), self._context.autocast():
                log_probs, mask = self._objective.log_probs(batch)
            total -= float(torch.where(mask, log_probs, 0.0).sum())
            tokens += float(mask.sum())
        return total / max(1.0, tokens)

    def _clear_gradients(self) -> None:
        for parameter in self._objective.parameters.values():
            parameter.grad = None
