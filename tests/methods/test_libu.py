"""LIBU on a tiny model that has learned its rows: the sign of phase 1 and the terms of phase 2."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.linalg import hadamard

from expunge.data.batches import Batch, collate, in_order
from expunge.data.random_text import random_examples
from expunge.errors import InputError
from expunge.methods.base import Context
from expunge.methods.libu import LIBU, LIBUObjective

Contexts = Callable[..., Context]


@pytest.fixture
def context(make_context: Contexts, memorised_dir: Path) -> Context:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(memorised_dir, dtype=torch.float32).eval()
    return dataclasses.replace(make_context(), model=model)


def whole(context: Context, side: str) -> Batch:
    examples = getattr(context, side)
    return next(iter(in_order(examples, len(examples), context.pad_id)))


def loss(objective: LIBUObjective, batch: Batch) -> float:
    with torch.no_grad():
        return float(objective.cross_entropy(batch))


def before(objective: LIBUObjective, batch: Batch) -> float:
    with objective.reference():
        return float(objective.cross_entropy(batch))


def test_phase_1_raises_the_forget_loss_within_the_budget_on_retain(context: Context) -> None:
    objective = LIBU(rank=4, step_budget=0.05).start(context)
    forget, retain = whole(context, "forget"), whole(context, "retain")
    assert loss(objective, forget) > before(objective, forget) + 1e-3
    assert loss(objective, retain) - before(objective, retain) < 0.05 + 1e-4
    notes: Any = objective.notes()
    assert 0 < notes["phase_1"]["measured_retain_rise"] <= 0.05
    assert notes["phase_1"]["step_size"] > 0


def test_the_published_direction_learns_the_forget_set_better(make_context: Contexts) -> None:
    """On a model that has something left to learn."""
    context = make_context()
    settings = LIBU(rank=4, direction="as-published", step_budget=1e-3)
    objective = settings.start(context)
    forget = whole(context, "forget")
    assert loss(objective, forget) < before(objective, forget)
    # And its phase 2 descends too: the gradient step lowers the forget loss.
    terms = objective.loss(forget, None)
    assert float(terms.total.detach()) == pytest.approx(loss(objective, forget), rel=1e-5)


def test_a_fresh_adapter_moves_b_only_and_then_both(context: Context) -> None:
    objective = LIBU(rank=4).start(context)
    factors = objective.parameters
    assert all(p.any() for name, p in factors.items() if "lora_B" in name)
    batch = whole(context, "forget")
    objective.loss(batch, whole(context, "retain")).total.backward()
    for name, parameter in factors.items():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_phase_2_is_bounded_and_holds_retain(context: Context) -> None:
    objective = LIBU(rank=4, retain_weight=3.0, ceiling=2.0).start(context)
    forget, retain = whole(context, "forget"), whole(context, "retain")
    terms = objective.loss(forget, retain)
    assert terms.retain is not None
    log_probs, mask = objective.log_probs(forget)
    with torch.no_grad(), objective.reference():
        before, _ = objective.log_probs(forget)

    def log_odds(log_prob: float) -> float:
        return log_prob - math.log(-math.expm1(log_prob))

    def huber(x: float, width: float) -> float:
        return x * x / (2 * width) if abs(x) < width else abs(x) - width / 2

    # A token that the target gave less than exp(-2) is not made more likely.
    pairs = zip(log_probs[mask].tolist(), before[mask].tolist(), strict=True)
    distances = [huber(log_odds(now) - log_odds(min(-2.0, was)), 16) for now, was in pairs]
    assert any(was < -2 for was in before[mask].tolist())
    expected = sum(distances) / len(distances)
    assert float(terms.forget.detach()) == pytest.approx(expected, rel=1e-4)
    # Retain tokens are held at the odds that they had.
    log_probs, mask = objective.log_probs(retain)
    with torch.no_grad(), objective.reference():
        before, _ = objective.log_probs(retain)
    pairs = zip(log_probs[mask].double().tolist(), before[mask].double().tolist(), strict=True)
    drifts = [huber(log_odds(now) - log_odds(was), 2) for now, was in pairs]
    expected = 3 * sum(drifts) / len(drifts)
    assert expected > 0  # phase 1 has moved the model
    # float32 probabilities near 1 are what the slow way reads odds from.
    assert float(terms.retain.detach()) == pytest.approx(expected, rel=1e-2)


def test_random_rows_hold_the_targets_predictions(context: Context, tokenizer: Any) -> None:
    """Weighed by tokens: odds of the user's rows, KL to the target of random ones."""
    held = random_examples(2, tokenizer, 10**6, 32, seed=0)
    context = dataclasses.replace(context, retain=[*context.retain, *held])
    objective = LIBU(rank=4, retain_weight=3.0).start(context)
    count = len(context.retain)

    def terms(*rows: int) -> torch.Tensor:
        batch = collate(context.retain, rows, context.pad_id)
        found = objective.loss(whole(context, "forget"), batch).retain
        assert found is not None
        return found.detach() * objective.retain_size(batch) / 3.0

    random = collate(context.retain, [count - 2, count - 1], context.pad_id)
    with torch.no_grad(), objective.reference():
        before = objective.logits(random)[:, :-1].double().log_softmax(-1)
    with torch.no_grad():
        now = objective.logits(random)[:, :-1].double().log_softmax(-1)
    mask = random.token_mask[:, 1:]
    drift = (before.exp() * (before - now)).sum(-1)[mask].sum()
    assert float(drift) > 0  # phase 1 has moved the model
    assert float(terms(count - 2, count - 1)) == pytest.approx(float(drift), rel=1e-4)
    # Each kind counts as it does alone, wherever its rows stand in the batch.
    mixed = terms(count - 1, 0, count - 2, 1)
    assert float(mixed) == pytest.approx(float(terms(0, 1)) + float(drift), rel=1e-4)


def test_the_curvature_is_the_mean_squared_gradient_of_the_log_odds(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = LIBU(rank=4).start(context)
    batch = collate(context.retain, [0, 1], context.pad_id)
    log_probs, mask = objective.log_probs(batch)
    log_odds = log_probs[mask] - torch.log(-torch.expm1(log_probs[mask]))
    parameters = list(objective.parameters.values())
    exact = [torch.zeros_like(parameter) for parameter in parameters]
    for one in log_odds:
        for total, part in zip(
            exact, torch.autograd.grad(one, parameters, retain_graph=True), strict=True
        ):
            total += part.square() / len(log_odds)
    # The rows of a Hadamard matrix are signs without correlation: their mean has no error left.
    signs = hadamard(64)[:, : len(log_odds)]
    assert len(log_odds) <= 64
    found = [torch.zeros_like(parameter) for parameter in parameters]
    for row in signs:
        drawn = torch.tensor((row + 1) // 2)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randint", lambda *_, drawn=drawn: drawn)
            estimate = objective.curvature(batch)
        for total, part in zip(found, estimate, strict=True):
            total += part / len(signs)
    for name, a, b in zip(objective.parameters, exact, found, strict=True):
        # Log-odds from float32 log-probabilities near 0 are what the slow way has.
        assert torch.allclose(a, b, rtol=2e-2, atol=1e-3 * float(a.max())), name


def test_sophia_starts_from_the_curvature_of_the_retain_set(context: Context) -> None:
    objective = LIBU(rank=4).start(context)
    found, repeated = objective.initial_curvature(), objective.initial_curvature()
    assert found is not None
    assert repeated is not None
    assert all(torch.equal(a, b) for a, b in zip(found, repeated, strict=True))
    assert all(bool((h >= 0).all()) for h in found)
    assert any(h.any() for h in found)
    assert all(parameter.grad is None for parameter in objective.parameters.values())


def test_sampled_labels_start_from_phase_1s_fisher(context: Context) -> None:
    objective = LIBU(rank=4, curvature="sampled-labels").start(context)
    assert objective.optimizer.name == "sophia"
    curvature = objective.initial_curvature()
    assert curvature is not None
    for name, h in zip(objective.parameters, curvature, strict=True):
        assert torch.equal(h, objective.fisher[name])
    assert any(h.any() for h in curvature)


def test_the_default_ceiling_is_below_guessing(context: Context) -> None:
    ceiling = LIBU(rank=4).start(context).ceiling
    assert ceiling == pytest.approx(0.8 * math.log(context.model.config.vocab_size))


@pytest.mark.parametrize(
    ("settings", "option"),
    [
        ({"parameters": "full"}, "--method.parameters"),
        ({"damping": 0}, "--method.damping"),
        ({"ceiling": -1.0}, "--method.ceiling"),
        ({"beta2": 1.0}, "--method.beta2"),
        ({"rank": 0}, "--method.rank"),
        ({"retain_weight": -1.0}, "--method.retain_weight"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], option: str) -> None:
    with pytest.raises(InputError, match=option):
        LIBU(**settings)
