"""LIBU on a tiny model that has learned its rows: phase 1's step, and how phase 2 moves on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from expunge.data.batches import Batch, in_order
from expunge.errors import InputError
from expunge.methods.base import Context
from expunge.methods.influence_step import InfluenceStep
from expunge.methods.libu import LIBU, LIBUObjective
from expunge.methods.npo import NPO
from expunge.training.muon import Muon
from expunge.training.optimizers import optimizer_of

Contexts = Callable[..., Context]


@pytest.fixture
def memorised(make_context: Contexts, memorised_dir: Path) -> Callable[[], Context]:
    """Makes a context with a model of its own: an objective leaves its adapter on the model."""
    from transformers import AutoModelForCausalLM

    def make() -> Context:
        model = AutoModelForCausalLM.from_pretrained(memorised_dir, dtype=torch.float32).eval()
        return dataclasses.replace(make_context(), model=model)

    return make


@pytest.fixture
def context(memorised: Callable[[], Context]) -> Context:
    return memorised()


def whole(context: Context, side: str) -> Batch:
    examples = getattr(context, side)
    return next(iter(in_order(examples, len(examples), context.pad_id)))


def loss(objective: LIBUObjective, batch: Batch) -> float:
    with torch.no_grad():
        return float(objective.cross_entropy(batch))


def before(objective: LIBUObjective, batch: Batch) -> float:
    with objective.reference():
        return float(objective.cross_entropy(batch))


@pytest.mark.parametrize("preconditioner", ["diagonal", "ekfac"])
def test_phase_1_raises_the_forget_loss_within_the_budget_on_retain(
    context: Context, preconditioner: Any
) -> None:
    objective = LIBU(rank=4, step_budget=0.05, preconditioner=preconditioner).start(context)
    forget, retain = whole(context, "forget"), whole(context, "retain")
    assert loss(objective, forget) > before(objective, forget) + 1e-3
    assert loss(objective, retain) - before(objective, retain) < 0.05 + 1e-4
    notes: Any = objective.notes()
    assert 0 < notes["phase_1"]["measured_retain_rise"] <= 0.05
    assert notes["phase_1"]["step_size"] > 0
    rise = loss(objective, forget) - before(objective, forget)
    assert notes["phase_1"]["measured_forget_rise"] == pytest.approx(rise, rel=1e-3)


@pytest.mark.parametrize("preconditioner", ["diagonal", "ekfac"])
def test_the_damping_is_in_units_of_the_fishers_mean_entry(
    memorised: Callable[[], Context], preconditioner: Any
) -> None:
    """Of the diagonal over both factors, whatever the gradient is divided by."""
    context = memorised()
    fresh = NPO(rank=4).start(context)  # the same adapter, which no phase 1 has moved
    fisher = InfluenceStep(fresh, context).diagonal_fisher(context.retain)
    entries = torch.cat([part.flatten().double() for part in fisher.values()])
    settings = LIBU(rank=4, damping=0.3, preconditioner=preconditioner)
    notes: Any = settings.start(memorised()).notes()
    assert notes["phase_1"]["damping"] == pytest.approx(0.3 * float(entries.mean()), rel=1e-4)


def test_a_fresh_adapter_moves_b_only_and_then_both(context: Context) -> None:
    objective = LIBU(rank=4).start(context)
    factors = objective.parameters
    assert all(p.any() for name, p in factors.items() if "lora_B" in name)
    batch = whole(context, "forget")
    objective.loss(batch, whole(context, "retain")).total.backward()
    for name, parameter in factors.items():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_phase_1_leaves_a_as_it_was_drawn(memorised: Callable[[], Context]) -> None:
    drawn, moved = NPO(rank=4).start(memorised()), LIBU(rank=4).start(memorised())
    assert drawn.parameters.keys() == moved.parameters.keys()
    for name, parameter in drawn.parameters.items():
        assert torch.equal(parameter, moved.parameters[name]) == ("lora_A" in name), name


def test_phase_2_is_muon_on_the_factors(context: Context) -> None:
    objective = LIBU(rank=4).start(context)
    optimizer = optimizer_of(objective, 0.5)
    assert isinstance(optimizer, Muon)
    [group] = optimizer.param_groups
    assert list(map(id, group["params"])) == list(map(id, objective.parameters.values()))
    assert (group["lr"], group["momentum"], group["iterations"]) == (0.5, 0.95, 5)


def test_random_rows_take_no_part_in_phase_1(memorised: Callable[[], Context], tokenizer: Any) -> None:
    from expunge.data.random_text import random_examples

    context = memorised()
    held = random_examples(5, tokenizer, 10**6, 32, seed=0)
    both = [
        LIBU(rank=4).start(dataclasses.replace(memorised(), retain=retain)).notes()["phase_1"]
        for retain in (context.retain, [*held, *context.retain])
    ]
    assert both[0] == both[1]


@pytest.mark.parametrize(
    ("settings", "option"),
    [
        ({"damping": 0}, "--method.damping"),
        ({"step_budget": 0.0}, "--method.step-budget"),
        ({"rank": 0}, "--method.rank"),
        ({"lora_dropout": 1.0}, "--method.lora-dropout"),
        ({"lora_alpha": 0.0}, "--method.lora-alpha"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], option: str) -> None:
    with pytest.raises(InputError, match=option):
        LIBU(**settings)
