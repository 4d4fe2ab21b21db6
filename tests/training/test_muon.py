"""Muon against a slow reference by singular values, and whitened against its definition."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from expunge.maths.whitening import SecondMoment, second_moments
from expunge.methods.base import Whitening
from expunge.training import muon
from expunge.training.muon import Muon, direction, orthogonalised

BFLOAT16 = 2e-2
"""Of a number near 1, after some products of bfloat16."""


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_singular_values(matrix: torch.Tensor, iterations: int) -> torch.Tensor:
    """The same polynomial on each singular value alone."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.norm()
    for _ in range(iterations):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return (left * values) @ right


@pytest.mark.parametrize("shape", [(6, 6), (12, 5), (5, 12), (1, 4)])
@pytest.mark.parametrize("iterations", [0, 3, 5])
def test_iterations_change_singular_values_alone(shape: tuple[int, int], iterations: int) -> None:
    matrix = draw(*shape)
    found = orthogonalised(matrix, iterations)
    assert found.dtype == torch.float32
    assert found.double() == pytest.approx(by_singular_values(matrix, iterations), abs=3 * BFLOAT16)


def test_five_iterations_flatten_the_spectrum() -> None:
    values = torch.linalg.svdvals(orthogonalised(draw(16, 24), 5))
    assert float(values.min()) > 0.6
    assert float(values.max()) < 1.3


def test_steps_are_those_of_torch() -> None:
    ours, theirs = (nn.Parameter(draw(12, 8)) for _ in range(2))
    optimizers = (
        Muon([ours], 0.01, iterations=5),
        torch.optim.Muon([theirs], 0.01, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
    )
    for step in range(3):
        for matrix, optimizer in zip((ours, theirs), optimizers, strict=True):
            matrix.grad = draw(12, 8, seed=step + 1)
            optimizer.step()
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_normalized_gradients_have_the_same_say_however_long_they_are() -> None:
    """As of unit gradients, whatever each step's is scaled by."""
    scaled, unit, plain = (nn.Parameter(draw(12, 8)) for _ in range(3))
    optimizers = (
        Muon([scaled], 0.01, normalized=True),
        Muon([unit], 0.01),
        Muon([plain], 0.01),
    )
    for step, length in enumerate((1e3, 1e-3, 1.0)):
        gradient = draw(12, 8, seed=step + 1)
        given = (length * gradient, gradient / gradient.norm(), length * gradient)
        for matrix, optimizer, grad in zip((scaled, unit, plain), optimizers, given, strict=True):
            matrix.grad = grad
            optimizer.step()
    assert torch.allclose(scaled, unit, atol=1e-5)
    assert not torch.allclose(scaled, plain, atol=1e-3)
    before = scaled.detach().clone()
    fresh = Muon([scaled], 0.01, normalized=True)
    scaled.grad = torch.zeros(12, 8)
    fresh.step()
    assert torch.equal(scaled, before)


def test_a_whitened_step_is_that_of_the_matrix_behind_white_inputs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """W x = (W R^-1) (R x), and R x is white: the step is taken on W R^-1."""
    monkeypatch.setattr(muon, "_PRODUCTS", torch.float32)
    inputs, gradient = draw(400, 6) @ draw(6, 6, seed=1), draw(9, 6, seed=2)
    moment = SecondMoment()
    moment.add(inputs)
    r = moment.whitening(1e-3).float()
    white = inputs @ r.T
    assert white.T @ white / len(white) == pytest.approx(torch.eye(6), abs=3 * BFLOAT16)
    step = direction(gradient, 5, Whitening(r))
    assert torch.equal(direction(gradient.T, 5, Whitening(r, turned=True)), step.T)
    other = orthogonalised(gradient @ r.T, 5) @ r  # of W R^-1, brought back
    assert torch.allclose(step / step.norm(), other / other.norm(), atol=1e-3)
    assert float(step.norm()) == pytest.approx(float(direction(gradient, 5).norm()), rel=0.1)


def test_inputs_that_are_white_change_nothing() -> None:
    moment = SecondMoment()
    moment.add(torch.eye(6))
    gradient = draw(9, 6)
    assert torch.allclose(
        direction(gradient, 5, Whitening(moment.whitening(0.2))),
        direction(gradient, 5),
        atol=BFLOAT16,
    )


def test_what_held_inputs_give_moves_less() -> None:
    """For steps of one length, where few directions hold nearly all of the inputs."""
    inputs = draw(400, 24) * torch.logspace(0, -3, 24)
    moment = SecondMoment()
    moment.add(inputs)
    gradient = draw(16, 24, seed=3)
    plain, white = (direction(gradient, 5, r) for r in (None, Whitening(moment.whitening(0.01))))
    assert (inputs @ white.T).norm() < 0.5 * (inputs @ plain.T).norm()


def test_moments_are_of_all_that_the_maps_were_given_and_hooks_go() -> None:
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.ReLU(), nn.Linear(3, 2, bias=False))
    first, second = draw(5, 4), draw(2, 7, 4, seed=1)
    with second_moments(model, ["0", "2"]) as moments:
        model(first)
        model(second)
    model(draw(9, 4, seed=2))
    given = torch.cat([first, second.flatten(0, 1)])
    assert moments["0"].count == moments["2"].count == 19
    r = moments["0"].whitening(0.5).float()
    inverse = torch.linalg.inv(r)
    expected = given.T @ given / 19
    expected += 0.5 * expected.diagonal().mean() * torch.eye(4)
    assert inverse @ inverse.T == pytest.approx(expected, abs=3 * BFLOAT16)


def test_moments_are_float32_inside_autocast_and_of_states_with_one_huge_direction() -> None:
    """As pretrained models have; in bfloat16 their moment is no moment of anything."""
    inputs = draw(400, 64) * torch.cat([torch.tensor([1e4]), torch.ones(63)])
    inside, outside = SecondMoment(), SecondMoment()
    outside.add(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        inside.add(inputs)
    assert torch.equal(inside.whitening(1e-3), outside.whitening(1e-3))


def test_inputs_of_zero_leave_the_step_finite_and_none_are_refused() -> None:
    moment = SecondMoment()
    with pytest.raises(ValueError, match="no inputs"):
        moment.whitening(0.2)
    moment.add(torch.zeros(3, 4))
    assert torch.isfinite(direction(draw(5, 4), 3, Whitening(moment.whitening(0.2)))).all()
