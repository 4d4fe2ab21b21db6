"""LIBU as published: its sign, its losses, Sophia's curvature from sampled labels, its presets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

from expunge.cli.run import parsed
from expunge.data.batches import Batch, collate, in_order
from expunge.errors import InputError
from expunge.methods.base import Context
from expunge.methods.influence_step import InfluenceStep
from expunge.methods.libu_published import PublishedLIBU, PublishedLIBUObjective
from expunge.methods.npo import NPO
from expunge.runs.run import RunInputs
from expunge.training.optimizers import optimizer_of
from expunge.training.sophia import Sophia

Contexts = Callable[..., Context]


@pytest.fixture
def context(make_context: Contexts) -> Context:
    return make_context(layers=3)


@pytest.fixture
def objective(context: Context) -> PublishedLIBUObjective:
    return PublishedLIBU(rank=2).start(context)


def whole(context: Context, side: str) -> Batch:
    examples = getattr(context, side)
    return next(iter(in_order(examples, len(examples), context.pad_id)))


def loss(objective: PublishedLIBUObjective, batch: Batch) -> float:
    with torch.no_grad():
        return float(objective.cross_entropy(batch))


def before(objective: PublishedLIBUObjective, batch: Batch) -> float:
    with objective.reference():
        return float(objective.cross_entropy(batch))


def test_the_published_direction_learns_the_forget_set_better(make_context: Contexts) -> None:
    """On a model that has something left to learn."""
    context = make_context()
    settings = PublishedLIBU(rank=4, direction="as-published", step_size=3e-3)
    objective = settings.start(context)
    forget = whole(context, "forget")
    assert loss(objective, forget) < before(objective, forget)
    # And its phase 2 descends too: the gradient step lowers the forget loss.
    terms = objective.loss(forget, None)
    assert float(terms.total.detach()) == pytest.approx(loss(objective, forget), rel=1e-5)


def test_to_remove_is_the_opposite_step(make_context: Contexts) -> None:
    """Of a given size: theta + s g / (F + lambda), of every factor that has a gradient."""
    context = make_context(layers=2)
    fresh = NPO(rank=4).start(context)  # the same adapter, which no phase 1 has moved
    start = {name: p.detach().clone() for name, p in fresh.parameters.items()}
    step = InfluenceStep(fresh, context)
    fisher, gradient = step.diagonal_fisher(context.retain), step.forget_gradient(context.forget)
    for sign, direction in ((1, "remove"), (-1, "as-published")):
        settings = PublishedLIBU(rank=4, direction=direction, step_size=3e-3, damping=0.01)  # type: ignore[arg-type]
        again = make_context(layers=2)
        objective = settings.start(again)
        notes: Any = objective.notes()
        assert notes["phase_1"]["step_size"] == 3e-3
        for name, parameter in objective.parameters.items():
            moved = sign * 3e-3 * gradient[name] / (fisher[name] + 0.01)
            assert bool(moved.any()) == ("lora_B" in name)
            torch.testing.assert_close(parameter.detach(), start[name] + moved)
        forget = whole(again, "forget")
        rise = loss(objective, forget) - before(objective, forget)
        assert sign * rise > 0
        assert notes["phase_1"]["measured_forget_rise"] == pytest.approx(rise, abs=1e-5)


@pytest.mark.parametrize("weight", [2.5, 0.0])
def test_phase_2_ascends_on_the_forget_loss_and_descends_on_the_retain_loss(
    context: Context, weight: float
) -> None:
    objective = PublishedLIBU(rank=2, retain_weight=weight).start(context)
    forget, retain = whole(context, "forget"), whole(context, "retain")
    terms = objective.loss(forget, retain)
    assert float(terms.forget.detach()) == pytest.approx(-loss(objective, forget), rel=1e-5)
    if not weight:
        assert terms.retain is None
        return
    assert terms.retain is not None
    assert float(terms.retain.detach()) == pytest.approx(weight * loss(objective, retain), rel=1e-5)


def test_sophia_starts_from_phase_1s_fisher(make_context: Contexts) -> None:
    objective = PublishedLIBU(rank=4).start(make_context())
    optimizer = optimizer_of(objective, 1e-3)
    assert isinstance(optimizer, Sophia)
    assert objective.optimizer.options == {"gamma": 1.0, "rho": 0.04, "betas": (0.9, 0.999)}
    assert objective.optimizer.curvature_interval == 10
    curvature = objective.initial_curvature()
    assert curvature is not None
    # That of the adapter as it was before phase 1 moved it.
    context = make_context()
    fresh = NPO(rank=4).start(context)
    expected = InfluenceStep(fresh, context).diagonal_fisher(context.retain)
    for name, found in zip(objective.parameters, curvature, strict=True):
        assert torch.equal(found, expected[name]), name
    assert any(h.any() for h in curvature)


def test_a_resumed_start_takes_no_step_and_has_no_curvature(
    make_context: Contexts, objective: PublishedLIBUObjective
) -> None:
    context = dataclasses.replace(make_context(layers=3), resumed=objective.notes())
    resumed = PublishedLIBU(rank=2).start(context)
    assert not any(p.any() for name, p in resumed.parameters.items() if "lora_B" in name)
    assert resumed.initial_curvature() is None
    assert resumed.notes() == objective.notes()


def test_the_curvature_is_that_of_labels_drawn_from_the_model(
    context: Context, objective: PublishedLIBUObjective, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens times the squared gradient of their mean loss on these labels."""
    batch = collate(context.retain, [0, 3], context.pad_id)
    logits = objective.counted_logits(batch)
    labels = torch.arange(len(logits)) % logits.shape[-1]
    drawn_from = []

    def draw(probabilities: torch.Tensor, count: int) -> torch.Tensor:
        assert count == 1
        drawn_from.append(probabilities)
        return labels[:, None]

    monkeypatch.setattr(torch, "multinomial", draw)
    found = objective.curvature(batch)
    torch.testing.assert_close(drawn_from[0], logits.detach().softmax(-1))
    parameters = list(objective.parameters.values())
    gradients = torch.autograd.grad(functional.cross_entropy(logits, labels), parameters)
    assert len(labels) == int(batch.token_mask[:, 1:].sum())
    for name, one, gradient in zip(objective.parameters, found, gradients, strict=True):
        expected = len(labels) * gradient.square()
        torch.testing.assert_close(one, expected, rtol=1e-3, atol=1e-9, msg=name)
        assert expected.any()


def test_sampled_label_curvature_estimates_the_squared_gradients(
    context: Context, objective: PublishedLIBUObjective
) -> None:
    """Its mean over many draws is the Fisher under the model's own labels: positive and stable."""
    torch.manual_seed(0)
    batch = collate(context.retain, [0, 1, 2], context.pad_id)
    draws = [objective.curvature(batch) for _ in range(60)]
    first = torch.stack([torch.cat([h.flatten() for h in d]) for d in draws[:30]]).mean(0)
    second = torch.stack([torch.cat([h.flatten() for h in d]) for d in draws[30:]]).mean(0)
    assert float(first.min()) >= 0
    # Two halves of the draws agree on the total to what 30 draws of a chi-square-like sum allow.
    assert float(first.sum() / second.sum()) == pytest.approx(1, abs=0.4)
    assert not torch.equal(torch.cat([h.flatten() for h in draws[0]]), first)


PUBLISHED = {"rank": 16, "lora_alpha": 32.0, "lora_dropout": 0.05, "targets": "attention"}


@pytest.mark.parametrize(
    ("preset", "rate", "settings"),
    [
        ("setup-2", 3e-5, {"direction": "remove", "step_size": None, "retain_weight": 2.0}),
        ("setup-3", 2e-5, {"direction": "remove", "step_size": None, "retain_weight": 2.0}),
        (
            "as-published",
            2e-5,
            {"direction": "as-published", "step_size": 2e-5, "retain_weight": 0.0},
        ),
    ],
)
def test_presets_are_what_was_published(preset: str, rate: float, settings: dict[str, Any]) -> None:
    words = ["M", "--forget", "F", "--retain", "R", "--output", "O"]
    words += ["--method", "libu-published", "--preset", preset]
    command, chosen = parsed(words, "expunge run", RunInputs, "")
    assert chosen == preset
    found = vars(command.settings)
    expected = {**PUBLISHED, **settings, "damping": 1e-3, "rho": 0.04, "gamma": 1.0}
    assert {name: found[name] for name in expected} == expected
    training = command.training
    assert (training.learning_rate, training.epochs, training.batch_size) == (rate, 5, 16)
    assert training.schedule == "constant"
    assert "2506.04044" in PublishedLIBU.presets[preset].source


@pytest.mark.parametrize(
    ("settings", "option"),
    [
        ({"damping": 0}, "--method.damping"),
        ({"gamma": 0.0}, "--method.gamma"),
        ({"rho": -1.0}, "--method.rho"),
        ({"step_size": 0.0}, "--method.step-size"),
        ({"curvature_interval": 0}, "--method.curvature-interval"),
        ({"retain_weight": -1.0}, "--method.retain-weight"),
        ({"rank": 0}, "--method.rank"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], option: str) -> None:
    with pytest.raises(InputError, match=option):
        PublishedLIBU(**settings)
