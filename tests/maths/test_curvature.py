"""Solves with the curvature against dense matrices."""

from __future__ import annotations

import pytest
import torch

from expunge.maths.curvature import (
    Curvature,
    DiagonalCurvature,
    Eigenbasis,
    EigenbasisCurvature,
)

OUT, IN = 3, 4


def orthogonal(size: int, generator: torch.Generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q


def made(kind: str, damping: float) -> tuple[Curvature, torch.Tensor]:
    """A curvature and its dense matrix, (out * in, out * in), without the damping."""
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(OUT, IN, generator=generator, dtype=torch.float64)
    if kind == "diagonal":
        return DiagonalCurvature({"map": values}, damping), values.flatten().diag()
    basis = Eigenbasis(orthogonal(OUT, generator), orthogonal(IN, generator))
    turn = torch.kron(basis.outputs, basis.inputs)  # of matrices that are flattened row by row
    dense = turn @ values.flatten().diag() @ turn.T
    return EigenbasisCurvature({"map": basis}, {"map": values}, damping), dense


@pytest.mark.parametrize("kind", ["diagonal", "ekfac"])
@pytest.mark.parametrize("damping", [1e-3, 1.0, 1e6])
def test_solve_and_energy_are_those_of_the_dense_matrix(kind: str, damping: float) -> None:
    curvature, dense = made(kind, damping)
    gradient = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    damped = dense + damping * torch.eye(OUT * IN, dtype=torch.float64)
    expected = torch.linalg.solve(damped, gradient.flatten()).view(OUT, IN)
    torch.testing.assert_close(curvature.solve("map", gradient), expected)
    energy = curvature.energy("map", gradient)
    torch.testing.assert_close(energy, (gradient * expected).sum())
    assert float(energy) > 0


@pytest.mark.parametrize("kind", ["diagonal", "ekfac"])
def test_the_rise_is_the_dense_quadratic_form_without_the_damping(kind: str) -> None:
    curvature, dense = made(kind, 7.0)
    step = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = step.flatten() @ dense @ step.flatten() / 2
    torch.testing.assert_close(curvature.rise("map", step), expected)


@pytest.mark.parametrize("kind", ["diagonal", "ekfac"])
def test_much_damping_leaves_the_gradient_and_forgets_the_curvature(kind: str) -> None:
    curvature, _ = made(kind, 1e9)
    gradient = torch.randn(OUT, IN, dtype=torch.float64)
    torch.testing.assert_close(curvature.solve("map", gradient) * 1e9, gradient)


def test_the_mean_is_the_trace_over_the_size_in_every_basis() -> None:
    for kind in ("diagonal", "ekfac"):
        curvature, dense = made(kind, 0.1)
        assert curvature.mean() == pytest.approx(float(dense.trace()) / (OUT * IN))


def test_a_basis_turns_and_turns_back() -> None:
    generator = torch.Generator().manual_seed(2)
    basis = Eigenbasis(orthogonal(OUT, generator), orthogonal(IN, generator))
    gradient = torch.randn(OUT, IN, dtype=torch.float64)
    turned = basis.into(gradient)
    assert not torch.allclose(turned, gradient)
    torch.testing.assert_close(basis.out_of(turned), gradient)
    torch.testing.assert_close(turned.norm(), gradient.norm())
