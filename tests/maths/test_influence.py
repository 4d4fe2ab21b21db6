"""The sign and size of phase 1 on a convex model, where retraining is the exact answer."""

from __future__ import annotations

import pytest
import torch

from expunge.maths.influence import predicted_rise, removal_step, size_within

ROWS, FORGOTTEN, FEATURES = 400, 8, 4


def _problem() -> tuple[torch.Tensor, torch.Tensor]:
    """Logistic regression on one-hot features: its Hessian is diagonal, as LIBU assumes."""
    generator = torch.Generator().manual_seed(0)
    features = torch.eye(FEATURES, dtype=torch.float64)[
        torch.randint(FEATURES, (ROWS,), generator=generator)
    ]
    labels = (torch.rand(ROWS, generator=generator) < 0.3 + 0.4 * features[:, 0]).double()
    labels[:FORGOTTEN] = 1.0  # what is to be forgotten pulls every weight up
    return features, labels


def _losses(weights: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.binary_cross_entropy_with_logits(x @ weights, y, reduction="none")


def _trained(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    weights = torch.zeros(FEATURES, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=500, tolerance_grad=1e-12)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = _losses(weights, x, y).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


def _pieces() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights on all rows, on the retained rows, the forget gradient and the retain Hessian."""
    x, y = _problem()
    everything, retrained = _trained(x, y), _trained(x[FORGOTTEN:], y[FORGOTTEN:])
    weights = everything.clone().requires_grad_(True)
    gradient = torch.autograd.grad(
        _losses(weights, x[:FORGOTTEN], y[:FORGOTTEN]).sum() / (ROWS - FORGOTTEN), weights
    )[0]
    share = torch.sigmoid(x[FORGOTTEN:] @ everything)
    hessian = (x[FORGOTTEN:].square() * (share * (1 - share))[:, None]).mean(0)
    return everything, retrained, gradient, hessian


def test_the_removal_step_lands_on_the_weights_retrained_without_the_rows() -> None:
    everything, retrained, gradient, hessian = _pieces()
    moved = everything + removal_step(gradient, hessian, damping=0.0)
    before = float((everything - retrained).norm())
    assert before > 1e-3
    assert float((moved - retrained).norm()) < 0.05 * before


def test_the_published_direction_moves_away() -> None:
    everything, retrained, gradient, hessian = _pieces()
    moved = everything - removal_step(gradient, hessian, damping=0.0)
    assert float((moved - retrained).norm()) > 1.9 * float((everything - retrained).norm())


def test_damping_shortens_the_step_and_keeps_its_sign() -> None:
    gradient, curvature = torch.tensor([1.0, -2.0, 0.0]), torch.tensor([0.0, 1.0, 5.0])
    steps = [removal_step(gradient, curvature, damping) for damping in (0.5, 1.0, 100.0)]
    for shorter, longer in zip(steps[1:], steps, strict=False):
        assert (shorter.abs() <= longer.abs()).all()
        assert torch.equal(shorter.sign(), longer.sign())


def test_the_trust_region_meets_its_budget_exactly_on_a_quadratic() -> None:
    curvature = torch.tensor([1.0, 4.0])
    step = torch.tensor([3.0, -1.0])
    size = size_within(0.02, float(predicted_rise(step, curvature)))
    assert float(predicted_rise(size * step, curvature)) == pytest.approx(0.02, rel=1e-5)
