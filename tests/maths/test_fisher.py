"""Per-example squared gradients against one backward pass an example."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from expunge.data.batches import collate, in_order
from expunge.maths.fisher import (
    FactorCovariances,
    SquaredGradients,
    squared_example_gradients,
)
from expunge.maths.numerics import row_means
from expunge.methods.base import Context
from expunge.methods.influence_step import InfluenceStep
from expunge.methods.libu import LIBU, LIBUObjective
from expunge.methods.npo import NPO


def test_factors_give_the_gradient_of_each_example() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(4, 3, bias=False)
    inputs = torch.randn(5, 6, 4, generator=generator)
    expected = torch.zeros(3, 4)
    for row in inputs:
        layer.zero_grad()
        layer(row).tanh().sum().backward()
        assert layer.weight.grad is not None
        expected += layer.weight.grad.square()
    collected = SquaredGradients([("weight", layer)])
    with collected.collecting(5):
        layer(inputs).tanh().sum().backward()
    torch.testing.assert_close(collected.mean()["weight"], expected / 5)


@pytest.mark.parametrize("chunk", [1, 100, 2**20])
@pytest.mark.parametrize(
    ("rows", "tokens", "inside", "out"), [(4, 3, 7, 5), (3, 11, 2, 6), (1, 1, 3, 3), (5, 2, 8, 1)]
)
def test_factors_give_the_sum_of_squares_whatever_the_shapes(
    rows: int, tokens: int, inside: int, out: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More tokens than the rank and fewer, padded rows, in chunks and at once."""
    monkeypatch.setattr("expunge.maths.fisher._CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(rows, tokens, inside, generator=generator)
    gradients = torch.randn(rows, tokens, out, generator=generator)
    gradients[-1, tokens // 2 + 1 :] = 0  # padding gets no gradient, whatever its input
    expected = torch.zeros(out, inside, dtype=torch.float64)
    for x, g in zip(inputs.double(), gradients.double(), strict=True):
        example = torch.zeros_like(expected)
        for x_t, g_t in zip(x, g, strict=True):
            example += torch.outer(g_t, x_t)
        expected += example**2
    # Against float64.
    found = squared_example_gradients(inputs, gradients).double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_bases_are_the_eigenvectors_of_the_tokens_that_count() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(4, 3, bias=False)
    inputs, weights = (torch.randn(5, 6, n, generator=generator) for n in (4, 3))
    weights[-1, 2:] = 0  # padding: whatever stands there must not turn an axis
    inputs[-1, 2:] = 1e3
    covariances = FactorCovariances([("map", layer)])
    for rows in (slice(0, 2), slice(2, 5)):
        with covariances.collecting():
            (layer(inputs[rows]) * weights[rows]).sum().backward()
    basis = covariances.bases()["map"]
    counted = [(x, g) for x, g in zip(inputs.view(-1, 4), weights.view(-1, 3), strict=True) if g.any()]
    for axes, factor in ((basis.inputs, 0), (basis.outputs, 1)):
        dense = torch.zeros(len(axes), len(axes))
        for token in counted:
            dense += torch.outer(token[factor], token[factor])
        turned = axes.T @ dense @ axes
        torch.testing.assert_close(turned, turned.diag().diag(), rtol=0, atol=1e-3)
        torch.testing.assert_close(axes.T @ axes, torch.eye(len(axes)), rtol=0, atol=1e-5)


def test_ekfac_eigenvalues_are_the_squares_along_the_axes(
    context: Context, objective: LIBUObjective
) -> None:
    """Against one example at a time, and with the trace of the diagonal."""
    step = InfluenceStep(objective, context)
    found = step.ekfac(context.retain, objective.parameters)
    assert set(found.eigenvalues) == set(objective.parameters)
    expected = {name: torch.zeros_like(part) for name, part in objective.parameters.items()}
    for tokens, gradients in one_at_a_time(context, objective):
        for name, part in gradients.items():
            turned = found.bases[name].into(part)
            expected[name] += tokens * turned.square() / len(context.retain)
    diagonal = step.diagonal_fisher(context.retain)
    for name, values in found.eigenvalues.items():
        # Sums in another order, float32.
        torch.testing.assert_close(values, expected[name], rtol=1e-2, atol=1e-8)
        assert float(values.sum()) == pytest.approx(float(diagonal[name].sum()), rel=1e-3)


def test_what_moves_first_is_what_has_a_gradient(make_context: Callable[..., Context]) -> None:
    """With B = 0 phase 1 needs no basis of A, whose inputs are the widest there are."""
    context = make_context(layers=2)
    objective = NPO(rank=2).start(context)
    batch = collate(context.forget, range(2), context.pad_id)
    objective.cross_entropy(batch).backward()
    moved = [name for name, p in objective.parameters.items() if p.grad is not None and p.grad.any()]
    assert objective.adapter is not None
    assert sorted(moved) == sorted(objective.adapter.moves_first)


def test_the_weights_get_no_gradient_meanwhile_and_do_afterwards() -> None:
    layers = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Tanh(), nn.Linear(3, 2, bias=False))
    frozen = layers[2].weight.requires_grad_(False)
    inputs = torch.randn(5, 6, 4, generator=torch.Generator().manual_seed(0))
    collected = SquaredGradients([("first", layers[0]), ("last", layers[2])])
    with collected.collecting(5):
        layers(inputs).sum().backward()
    assert layers[0].weight.grad is None
    assert all(fisher.any() for fisher in collected.mean().values())
    assert layers[0].weight.requires_grad
    assert not frozen.requires_grad


def test_the_hooks_are_gone_afterwards_even_after_an_error() -> None:
    layer = nn.Linear(2, 2, bias=False)
    collected = SquaredGradients([("weight", layer)])
    with pytest.raises(ZeroDivisionError), collected.collecting(1):
        raise ZeroDivisionError
    assert not layer._forward_hooks
    assert not collected.mean()["weight"].any()


def test_the_squared_mean_underestimates() -> None:
    """Two opposite examples: the batch's mean gradient is 0, the Fisher is not (FACTS trap 4)."""
    inputs = torch.ones(2, 1, 1)
    gradients = torch.tensor([[[1.0]], [[-1.0]]])
    assert float(squared_example_gradients(inputs, gradients)) == 2
    assert float(squared_example_gradients(inputs.view(1, 2, 1), gradients.view(1, 2, 1))) == 0


@pytest.fixture
def context(make_context: Callable[..., Context]) -> Context:
    return make_context(layers=3)


@pytest.fixture
def objective(context: Context) -> LIBUObjective:
    return LIBU(rank=2, targets="all").start(context)


def one_at_a_time(
    context: Context, objective: LIBUObjective
) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """The slow way: of each retain row its tokens and the gradient of their mean loss, by parameter."""
    for index in range(len(context.retain)):
        batch = collate(context.retain, [index], context.pad_id)
        with context.autocast():
            log_probs, mask = objective.log_probs(batch)
            loss = -row_means(log_probs, mask).sum()
        gradients = torch.autograd.grad(loss, list(objective.parameters.values()))
        yield int(mask.sum()), dict(zip(objective.parameters, gradients, strict=True))


def test_libu_fisher_is_the_exact_diagonal(context: Context, objective: LIBUObjective) -> None:
    """Both factors after phase 1, padded batches of 3, against one example at a time."""
    found = InfluenceStep(objective, context).diagonal_fisher(context.retain)
    expected = {name: torch.zeros_like(p) for name, p in objective.parameters.items()}
    for tokens, gradients in one_at_a_time(context, objective):
        for name, gradient in gradients.items():
            expected[name] += tokens * gradient.square() / len(context.retain)
    for name, fisher in found.items():
        # Sums in another order, float32.
        torch.testing.assert_close(fisher, expected[name], rtol=1e-3, atol=1e-9)
    assert any(fisher.any() for name, fisher in found.items() if "lora_A" in name)


def test_libu_fisher_does_not_depend_on_the_batch_size(
    context: Context, objective: LIBUObjective
) -> None:
    found = InfluenceStep(objective, context).diagonal_fisher(context.retain)
    object.__setattr__(context, "batch_size", 1)
    alone = InfluenceStep(objective, context).diagonal_fisher(context.retain)
    for name in found:
        torch.testing.assert_close(found[name], alone[name], rtol=1e-3, atol=1e-9)


def test_libu_fisher_is_the_same_with_recomputed_activations(
    make_context: Callable[..., Context], context: Context, objective: LIBUObjective
) -> None:
    other = make_context(layers=3)
    recomputing = LIBU(rank=2, targets="all", gradient_checkpointing=True).start(other)
    found, expected = (
        InfluenceStep(o, c).diagonal_fisher(context.retain)
        for o, c in ((recomputing, other), (objective, context))
    )
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-9)


def test_libu_fisher_in_bfloat16_is_that_of_its_own_gradients(
    make_context: Callable[..., Context],
) -> None:
    context = make_context(layers=3)
    context.model.to(torch.bfloat16)
    low = dataclasses.replace(context, autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    objective = LIBU(rank=2, targets="all").start(low)
    found = InfluenceStep(objective, low).diagonal_fisher(context.retain)
    expected = {name: torch.zeros_like(p) for name, p in objective.parameters.items()}
    for tokens, gradients in one_at_a_time(low, objective):
        for name, gradient in gradients.items():
            expected[name] += tokens * gradient.square() / len(context.retain)
    for name, fisher in found.items():
        assert fisher.dtype == torch.float32
        # bfloat16 has 8 bits; the loss's factor sqrt(T) rounds otherwise than T afterwards.
        error = (fisher - expected[name]).norm() / expected[name].norm()
        assert float(error) < 0.03, name


def test_forget_gradient_is_that_of_the_mean_token_loss(
    context: Context, objective: LIBUObjective
) -> None:
    found = InfluenceStep(objective, context).forget_gradient(context.forget)
    (batch,) = in_order(context.forget, len(context.forget), context.pad_id)
    loss = objective.cross_entropy(batch)
    gradients = torch.autograd.grad(loss, list(objective.parameters.values()))
    for name, gradient in zip(found, gradients, strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-7)
