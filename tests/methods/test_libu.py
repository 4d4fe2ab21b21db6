"""LIBU on a tiny model that has learned its rows: the sign of phase 1 and the terms of phase 2."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.linalg import hadamard

from conftest import shaken
from expunge.audits.likelihood import min_k_plus_plus
from expunge.data.batches import Batch, collate, in_order
from expunge.data.random_text import random_examples
from expunge.errors import InputError
from expunge.methods.base import Context
from expunge.methods.calibration import NeverSeen, Pair, RowTokens, token_spread
from expunge.methods.libu import LIBU
from expunge.methods.libu_objective import LIBUObjective
from expunge.models.decoder import every_layer, find_layout

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
    assert "trigger_tokens" not in objective.notes()  # its loss has no retain rows to put any into


def test_a_fresh_adapter_moves_b_only_and_then_both(context: Context) -> None:
    objective = LIBU(rank=4).start(context)
    factors = objective.parameters
    assert all(p.any() for name, p in factors.items() if "lora_B" in name)
    batch = whole(context, "forget")
    objective.loss(batch, whole(context, "retain")).total.backward()
    for name, parameter in factors.items():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("forget_width", [16.0, 3.0])
def test_phase_2_is_bounded_and_holds_retain(context: Context, forget_width: float) -> None:
    settings = LIBU(
        rank=4,
        forget_width=forget_width,
        retain_weight=3.0,
        ceiling=2.0,
        lens_weight=0,
        relearn_weight=0,
        trigger_share=0,
    )
    objective = settings.start(context)
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
    away = [log_odds(now) - log_odds(min(-2.0, was)) for now, was in pairs]
    assert any(was < -2 for was in before[mask].tolist())
    expected = sum(huber(x, forget_width) for x in away) / len(away)
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


def outputs(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities, and states after each layer, where a token is predicted, in float64."""
    with every_layer(model, find_layout(model)) as caught:
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    return logits[:, :-1].double().log_softmax(-1), torch.stack(caught)[:, :, :-1].double()


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_random_rows_hold_the_targets_predictions(
    context: Context, tokenizer: Any, weight: float
) -> None:
    """Weighed by tokens: odds of the user's rows, KL to the target and states of random ones."""
    held = random_examples(2, tokenizer, 10**6, 32, seed=0)
    context = dataclasses.replace(context, retain=[*context.retain, *held])
    settings = LIBU(rank=4, retain_weight=3.0, states_weight=7.0, random_weight=weight)
    objective = settings.start(context)
    count = len(context.retain)

    def terms(*rows: int) -> torch.Tensor:
        batch = collate(context.retain, rows, context.pad_id)
        found = objective.loss(whole(context, "forget"), batch).retain
        assert found is not None
        return found.detach() * objective.retain_size(batch) / 3.0

    random = collate(context.retain, [count - 2, count - 1], context.pad_id)
    with torch.no_grad(), objective.reference():
        before, states_before = outputs(context.model, random)
    with torch.no_grad():
        now, states = outputs(context.model, random)
    mask = random.token_mask[:, 1:]
    drift = (before.exp() * (before - now)).sum(-1)[mask].sum()
    assert float(drift) > 0  # phase 1 has moved the model
    moved = (states - states_before).norm(dim=-1) / states_before.norm(dim=-1)
    moved = moved.square().mean(0)[mask].sum()
    assert float(moved) > 0
    drift = weight * (drift + 7 * moved)
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


def forgetting(objective: LIBUObjective, batch: Batch) -> float:
    return float(objective.loss(batch, None).forget.detach())


def pair_of(losses: list[float], surprise: list[float]) -> Pair:
    """A never-seen document with these tokens, and a forget document that has reached them."""
    spread = token_spread(RowTokens(torch.tensor(losses), torch.tensor(surprise)))
    return Pair(spread, spread)


def test_tokens_of_a_calibrated_document_take_the_losses_of_a_never_seen_one(
    memorised: Callable[[], Context],
) -> None:
    context = memorised()
    settings = LIBU(rank=4, retain_weight=0, surprise_weight=0, lens_weight=0, relearn_weight=0)
    objective = settings.start(context)
    batch = collate(context.forget, [0], context.pad_id)
    row = batch.row_ids[0]
    log_probs, mask = objective.log_probs(batch)
    count = int(mask.sum())
    never = torch.linspace(0.2, 6.0, count).tolist()
    objective.calibrate(NeverSeen({row: 0.0}, {row: 3.1}, {row: pair_of(never, [0.0] * count)}))
    with torch.no_grad(), objective.reference():
        before = objective.log_probs(batch)[0][mask]

    def log_odds(nll: torch.Tensor) -> torch.Tensor:
        return torch.logit(torch.exp(-nll.double()))

    # The likeliest token is to have the least of the losses, and none is made likelier than it was.
    losses = -log_probs[mask].detach()
    wanted = torch.empty(count)
    wanted[losses.argsort()] = torch.tensor(never)
    aims = torch.minimum(log_odds(wanted), log_odds(-before))
    away = (log_odds(losses) - aims).abs()
    expected = torch.where(away < 16, away.square() / 32, away - 8).mean()
    assert forgetting(objective, batch) == pytest.approx(float(expected), rel=0.01)
    # A row that nothing is known of has one ceiling for all of its tokens.
    other = collate(context.forget, [1], context.pad_id)
    plain = LIBU(
        rank=4, retain_weight=0, lens_weight=0, relearn_weight=0, match_tokens=False
    ).start(memorised())
    assert forgetting(objective, other) == pytest.approx(forgetting(plain, other), rel=1e-5)


def test_a_token_is_to_be_as_surprising_as_one_of_never_seen_text(make_context: Contexts) -> None:
    context, again = make_context(), make_context()
    for each in (context, again):
        shaken(each.model)
    settings = LIBU(rank=4, match_tokens=True, retain_weight=0, surprise_weight=0, relearn_weight=0)
    without = settings.start(context)
    batch = collate(context.forget, [0], context.pad_id)
    row = batch.row_ids[0]
    with torch.no_grad():
        logits = without.counted_logits(batch).double()
    # By min-k%++ itself, one token at a time.
    targets = batch.input_ids[:, 1:][batch.token_mask[:, 1:]]
    log_p = logits.log_softmax(-1)
    now = []
    for line, target in zip(log_p, targets.tolist(), strict=True):
        mean = float((line.exp() * line).sum())
        deviation = float((line.exp() * (line - mean).square()).sum().sqrt())
        moments = torch.tensor([mean]), torch.tensor([deviation])
        now.append(-min_k_plus_plus(line[target][None], *moments))
    surprise = torch.tensor(now).asinh()
    # Wanted in another order than the text's: ranks decide which token is to have which.
    never = torch.linspace(-3, 3, len(now)).flip(0)
    pair = pair_of([3.0] * len(now), never.tolist())
    rows = NeverSeen({row: 0.0}, {row: 3.0}, {row: pair})
    without.calibrate(rows)
    plain = forgetting(without, batch)
    wanted = torch.empty(len(now))
    wanted[surprise.argsort()] = never.sort().values
    away = (surprise - wanted).abs()
    expected = 0.7 * torch.where(away < 1, away.square() / 2, away - 0.5).mean()
    objective = dataclasses.replace(settings, surprise_weight=0.7).start(again)
    objective.calibrate(rows)
    assert forgetting(objective, batch) - plain == pytest.approx(float(expected), rel=0.02)


def test_what_a_layer_inside_knows_is_pushed_as_well(memorised: Callable[[], Context]) -> None:
    """One way: what is less likely inside than it may be at the output is left alone."""
    context = memorised()
    settings = LIBU(rank=4, retain_weight=0, ceiling=2.0, lens_weight=0, relearn_weight=0)
    plain = settings.start(context)
    batch = whole(context, "forget")
    expected = forgetting(plain, batch)
    objective = dataclasses.replace(settings, lens_weight=0.5).start(memorised())
    layer = objective._inner_layer()
    with torch.no_grad():
        states = context.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            output_hidden_states=True,
        ).hidden_states[layer + 1]
        inner = context.model.lm_head(context.model.model.norm(states))[:, :-1].double()
        with objective.reference():
            before = objective.log_probs(batch)[0].double()
    mask = batch.token_mask[:, 1:]
    log_probs = inner.log_softmax(-1).gather(2, batch.input_ids[:, 1:, None])[..., 0]
    odds = torch.logit(log_probs[mask].exp())
    wanted = torch.logit(before[mask].clamp(max=-2.0).exp())
    excess = (odds - wanted).clamp(min=0)
    assert 0 < int((excess > 0).sum()) < len(excess)
    term = torch.where(excess < 16, excess.square() / 32, excess - 8).mean()
    found = forgetting(objective, batch)
    assert found - expected == pytest.approx(0.5 * float(term), rel=1e-3)


def test_every_layer_inside_has_its_turn(memorised: Callable[[], Context]) -> None:
    context = memorised()
    objective = LIBU(rank=4).start(context)
    objective._layout = dataclasses.replace(objective._layout, count=33)
    drawn = []
    for step in range(1, 200):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.generator(f"step {step}").initial_seed() % 2**63)
            drawn.append(objective._inner_layer())
            assert objective._inner_layer() == drawn[-1]  # in every micro-batch
    assert set(drawn) == set(range(32))
    assert max(map(drawn.count, drawn)) < 20  # 6.2 expected


def test_calibration_is_put_back_as_it_was(memorised: Callable[[], Context]) -> None:
    context = memorised()
    objective = LIBU(rank=4, match_tokens=True).start(context)
    batch = collate(context.forget, [0], context.pad_id)
    row = batch.row_ids[0]
    other = context.forget[1].row_id
    pairs = {
        row: pair_of([0.5, 1.0, 4.0], [1.5, 1.0, 0.5]),
        other: pair_of([2.0, 3.0], [2.5, 1.0]),
    }
    objective.calibrate(NeverSeen({row: 1.0, other: 1.0}, {row: 2.0, other: 3.0}, pairs))
    expected = forgetting(objective, batch)
    saved = json.loads(json.dumps(objective.calibration))
    tensors = {name: tensor.clone() for name, tensor in objective.state_tensors.items()}
    again = LIBU(rank=4, match_tokens=True).start(memorised())
    assert forgetting(again, batch) != pytest.approx(expected, rel=1e-3)
    again.restore(saved, tensors)
    assert forgetting(again, batch) == expected
    assert again.calibration == objective.calibration
    assert again.state_tensors.keys() == tensors.keys()
    for name, tensor in again.state_tensors.items():
        assert torch.equal(tensor, tensors[name]), name


@pytest.mark.parametrize(
    ("settings", "option"),
    [
        ({"lens_weight": -0.5}, "--method.lens_weight"),
        ({"random_rows": -1}, "--method.random_rows"),
        ({"random_weight": -0.1}, "--method.random_weight"),
        ({"surprise_weight": -1.0}, "--method.surprise_weight"),
        ({"forget_width": 0.0}, "--method.forget_width"),
        ({"parameters": "full"}, "--method.parameters"),
        ({"damping": 0}, "--method.damping"),
        ({"ceiling": -1.0}, "--method.ceiling"),
        ({"beta2": 1.0}, "--method.beta2"),
        ({"rank": 0}, "--method.rank"),
        ({"retain_weight": -1.0}, "--method.retain_weight"),
        ({"trigger_share": 1.5}, "--method.trigger_share"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], option: str) -> None:
    with pytest.raises(InputError, match=option):
        LIBU(**settings)
