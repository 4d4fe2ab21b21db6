"""Conjugate gradients for one system of blocks, A x = b, from products with A alone.

Hestenes and Stiefel, J. Res. Natl. Bur. Stand. 49 (1952), 409, preconditioned: each iteration takes one
product, and the error in the norm of A never rises. A is symmetric and positive definite.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from expunge.errors import RunError

Blocks = Mapping[str, torch.Tensor]
"""One vector, in parts of any shape by name."""


@dataclass(frozen=True)
class Solved:
    """What the iterations came to."""

    solution: dict[str, torch.Tensor]
    residuals: Sequence[float]
    """|b - A x| / |b| before the first iteration and after each, as the recurrence has it."""


def conjugate_gradients(
    product: Callable[[Blocks], Blocks],
    right: Blocks,
    precondition: Callable[[Blocks], Blocks],
    tolerance: float,
    most: int,
    advance: Callable[[int], None] = lambda _: None,
) -> Solved:
    """Solves from x = 0 until the residual is `tolerance` of |b|, or for `most` iterations.

    `precondition` multiplies by something near the inverse of A. Raises RunError where the products are
    not those of a positive definite A, or not finite.
    """
    solution = {name: torch.zeros_like(part) for name, part in right.items()}
    residual = {name: part.clone() for name, part in right.items()}
    whole = _dot(right, right) ** 0.5
    residuals = [1.0]
    if whole == 0:
        return Solved(solution, [0.0])
    near = precondition(residual)
    direction = {name: part.clone() for name, part in near.items()}
    old = _dot(residual, near)
    while residuals[-1] > tolerance and len(residuals) <= most:
        moved = product(direction)
        bend = _dot(direction, moved)
        if not 0 < bend < float("inf"):
            raise RunError(
                f"the curvature along a step is {bend:.3g}, so that no system can be solved; set"
                " --damping higher"
            )
        for name, part in solution.items():
            part.add_(direction[name], alpha=old / bend)
            residual[name].sub_(moved[name], alpha=old / bend)
        residuals.append(_dot(residual, residual) ** 0.5 / whole)
        near = precondition(residual)
        new = _dot(residual, near)
        for name, part in direction.items():
            part.mul_(new / old).add_(near[name])
        old = new
        advance(1)
    return Solved(solution, residuals)


def _dot(one: Blocks, other: Blocks) -> float:
    """Summed in float64."""
    return sum(float((one[name].double() * other[name].double()).sum()) for name in one)
