"""Steps inside the backward pass end where steps after it do, and hold one gradient at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from expunge.training.muon import Muon
from expunge.training.step_in_backward import StepInBackward

CPU = torch.device("cpu")


@pytest.fixture
def make() -> Callable[[], tuple[nn.Sequential, Muon]]:
    """The same network of three matrices and its optimiser, each time anew."""

    def network() -> tuple[nn.Sequential, Muon]:
        torch.manual_seed(0)
        layers = [nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 6, bias=False)]
        model = nn.Sequential(*layers, nn.Tanh(), nn.Linear(6, 2, bias=False))
        return model, Muon(model.parameters(), 0.1)

    return network


def losses(model: nn.Module, step: int) -> list[torch.Tensor]:
    """Of two micro-batches."""
    batch = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
    return [model(part).square().mean() for part in batch.split(4)]


def test_parameters_end_where_steps_after_the_pass_put_them(
    make: Callable[[], tuple[nn.Sequential, Muon]],
) -> None:
    plain, optimizer = make()
    other, inside = make()
    steps = StepInBackward(inside, other.parameters(), CPU)
    for step in range(4):
        for loss in losses(plain, step):
            loss.backward()
        length = torch.stack([p.grad.norm() for p in plain.parameters() if p.grad is not None]).norm()
        optimizer.step()
        optimizer.zero_grad()
        first, last = losses(other, step)
        before = [p.detach().clone() for p in other.parameters()]
        first.backward()
        assert all(torch.equal(p, was) for p, was in zip(other.parameters(), before, strict=True))
        with steps.moving():
            last.backward()
        assert all(p.grad is None for p in other.parameters())
        assert steps.norm() == pytest.approx(float(length), rel=1e-5)
    for ours, theirs in zip(other.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_gradient_that_is_no_number_moves_nothing(
    make: Callable[[], tuple[nn.Sequential, Muon]],
) -> None:
    model, optimizer = make()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    steps = StepInBackward(optimizer, model.parameters(), CPU)
    with steps.moving():
        (losses(model, 0)[0] * math.inf).backward()
    assert not math.isfinite(steps.norm())
    for parameter, was in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, was)


def test_one_gradient_is_there_at_a_time(
    make: Callable[[], tuple[nn.Sequential, Muon]],
) -> None:
    model, optimizer = make()
    parameters = list(model.parameters())
    seen = []
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(
            lambda _: seen.append(sum(p.grad is not None for p in parameters))
        )
    steps = StepInBackward(optimizer, parameters, CPU)
    with steps.moving():
        losses(model, 0)[0].backward()
    assert seen == [1, 1, 1]
