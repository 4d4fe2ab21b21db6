"""Sophia against its algorithm written out by hand, and at its limits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from expunge.training.sophia import Sophia, sophia_step


def test_it_follows_the_algorithm_step_by_step() -> None:
    parameter = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
    optimizer = Sophia(
        [parameter],
        lr=0.1,
        betas=(0.8, 0.9),
        gamma=0.5,
        rho=0.7,
        weight_decay=0.2,
        initial_curvature=[torch.tensor([1.0, 0.0, 10.0])],
    )
    theta, momentum, curvature = [1.0, -2.0, 0.5], [0.0] * 3, [1.0, 0.0, 10.0]
    generator = torch.Generator().manual_seed(0)
    for step in range(5):
        gradient = torch.randn(3, generator=generator)
        if step % 2 == 0:
            estimate = torch.rand(3, generator=generator)
            optimizer.update_curvature([estimate])
            curvature = [0.9 * h + 0.1 * float(e) for h, e in zip(curvature, estimate, strict=True)]
        parameter.grad = gradient.clone()
        optimizer.step()
        for i in range(3):
            momentum[i] = 0.8 * momentum[i] + 0.2 * float(gradient[i])
            theta[i] -= 0.1 * 0.2 * theta[i]
            ratio = momentum[i] / max(0.5 * curvature[i], 1e-12)
            theta[i] -= 0.1 * max(-0.7, min(0.7, ratio))
        assert parameter.tolist() == pytest.approx(theta, abs=1e-5)


def test_without_curvature_it_is_sign_momentum() -> None:
    step = sophia_step(torch.tensor([3.0, -1e-6]), torch.zeros(2), 1.0, 0.04, 1e-12)
    assert step.tolist() == pytest.approx([0.04, -0.04])


def test_with_large_curvature_it_is_a_newton_step() -> None:
    step = sophia_step(torch.tensor([3.0]), torch.tensor([30.0]), 1.0, 1.0, 1e-12)
    assert step.tolist() == pytest.approx([0.1])


def test_a_parameter_without_gradient_stays() -> None:
    parameter = nn.Parameter(torch.ones(2))
    Sophia([parameter], lr=1.0).step()
    assert parameter.tolist() == [1, 1]
