"""The curvature H of the training loss, block by block, and solves with it: (H + lambda)^-1 g.

A block is one linear map; its gradient is (out, in), with a last column for the bias where it has one.
Two approximations of the Fisher matrix, which stands for H:

    diagonal    H = diag(F),                              F the mean squared gradient
    EK-FAC      H = (Qs x Qa) diag(L) (Qs x Qa)^T         L the same in the eigenbasis of the map's
                                                          inputs (Qa) and output gradients (Qs)

George et al., arXiv 1806.03884; Grosse et al., arXiv 2308.03296, section 2.2. The eigenbasis turns the
gradients' main directions into axes, so that a diagonal there misses less.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from expunge.maths.influence import predicted_rise, removal_step

DampingUnit = Literal["mean-fisher", "absolute"]


class Curvature(Protocol):
    """Something that solves with H + lambda; every tensor is (out, in) of the named block."""

    damping: float
    """lambda, in the units of H."""

    def solve(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        """(H + lambda)^-1 gradient."""

    def energy(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        """gradient^T (H + lambda)^-1 gradient, a scalar, never negative."""

    def rise(self, name: str, step: torch.Tensor) -> torch.Tensor:
        """step^T H step / 2, a scalar: what a loss at its minimum rises by, without the damping."""

    def mean(self) -> float:
        """The mean of H's eigenvalues over all blocks: the unit of the damping."""


@dataclass
class DiagonalCurvature:
    """H as a diagonal."""

    fisher: Mapping[str, torch.Tensor]
    """Mean squared gradient by block, (out, in)."""
    damping: float = 0.0
    """lambda, in the units of `fisher`."""

    def solve(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        """gradient / (F + lambda), element-wise."""
        return removal_step(gradient, self.fisher[name], self.damping)

    def energy(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        """The sum of gradient^2 / (F + lambda)."""
        return (gradient * self.solve(name, gradient)).sum()

    def rise(self, name: str, step: torch.Tensor) -> torch.Tensor:
        """The sum of F step^2 / 2."""
        return predicted_rise(step, self.fisher[name])

    def mean(self) -> float:
        """The mean of F; trace over size is the same in every basis."""
        return _mean(self.fisher)


@dataclass(frozen=True)
class Eigenbasis:
    """One block's axes: columns are eigenvectors."""

    outputs: torch.Tensor
    """Qs, (out, out), of the output gradients' covariance."""
    inputs: torch.Tensor
    """Qa, (in, in), of the inputs' covariance."""

    def into(self, gradient: torch.Tensor) -> torch.Tensor:
        """Qs^T gradient Qa, (out, in)."""
        return self.outputs.T @ gradient @ self.inputs

    def out_of(self, turned: torch.Tensor) -> torch.Tensor:
        """Qs turned Qa^T, (out, in): undoes `into`."""
        return self.outputs @ turned @ self.inputs.T


@dataclass
class EigenbasisCurvature:
    """H as a diagonal in each block's eigenbasis (EK-FAC)."""

    bases: Mapping[str, Eigenbasis]
    eigenvalues: Mapping[str, torch.Tensor]
    """L by block, (out, in): mean squared gradient along the axes."""
    damping: float = 0.0
    """lambda, in the units of the eigenvalues."""

    def solve(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        """Qs [(Qs^T gradient Qa) / (L + lambda)] Qa^T."""
        basis = self.bases[name]
        turned = basis.into(gradient)
        return basis.out_of(removal_step(turned, self.eigenvalues[name], self.damping))

    def energy(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        """The same as gradient^T solve(gradient), at half the products."""
        turned = self.bases[name].into(gradient)
        return (turned * removal_step(turned, self.eigenvalues[name], self.damping)).sum()

    def rise(self, name: str, step: torch.Tensor) -> torch.Tensor:
        """The sum of L (Qs^T step Qa)^2 / 2."""
        return predicted_rise(self.bases[name].into(step), self.eigenvalues[name])

    def mean(self) -> float:
        """The mean of L."""
        return _mean(self.eigenvalues)


def _mean(blocks: Mapping[str, torch.Tensor]) -> float:
    total = sum(float(block.sum(dtype=torch.float64)) for block in blocks.values())
    return total / max(1, sum(block.numel() for block in blocks.values()))
