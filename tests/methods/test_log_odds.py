"""The loss that spectral unlearning and LIBU share, on a tiny model that has learned its rows."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import shaken
from expunge.data.batches import Batch, Tokens, collate
from expunge.data.random_text import random_examples
from expunge.errors import InputError
from expunge.evaluation.likelihood import min_k_plus_plus
from expunge.maths.calibration import NeverSeen, Pair, RowTokens, token_spread
from expunge.methods.base import Context
from expunge.methods.libu import LIBU
from expunge.methods.log_odds import (
    _SURPRISE_WEIGHT,
    FORGET_WIDTH,
    RETAIN_WIDTH,
    LogOddsObjective,
)
from expunge.methods.spectral import Spectral

Contexts = Callable[..., Context]
Start = Callable[..., "Started"]
METHODS: dict[str, Callable[..., Any]] = {
    "spectral": Spectral,
    "libu": lambda **settings: LIBU(rank=4, **settings),
}


@dataclass(frozen=True)
class Started:
    """A method whose weights were moved since it started, beside the model from before."""

    context: Context
    objective: LogOddsObjective
    target: Any

    def log_probs(self, batch: Batch, *, before: bool = False) -> torch.Tensor:
        """Of all next tokens, float64: (rows, tokens - 1, vocabulary)."""
        model = self.target if before else self.context.model
        with torch.no_grad():
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        found: torch.Tensor = logits[:, :-1].double().log_softmax(-1)
        return found

    def log_odds(self, batch: Batch, tokens: Tokens, *, before: bool = False) -> list[float]:
        """Of each counted token, from the logarithm of all the others' probabilities."""
        odds = []
        for row, ids, mask in zip(
            self.log_probs(batch, before=before), batch.input_ids, batch.mask(tokens), strict=True
        ):
            for place in mask[1:].nonzero()[:, 0].tolist():
                token = int(ids[place + 1])
                others = torch.cat([row[place, :token], row[place, token + 1 :]])
                odds.append(float(row[place, token] - others.logsumexp(0)))
        return odds


@pytest.fixture
def original(memorised_dir: Path) -> Callable[[], Any]:
    """Loads the model anew: an objective leaves its adapter or its masters on it."""
    from transformers import AutoModelForCausalLM

    return lambda: AutoModelForCausalLM.from_pretrained(memorised_dir, dtype=torch.float32).eval()


@pytest.fixture(params=METHODS)
def start(request: pytest.FixtureRequest, make_context: Contexts, original: Callable[[], Any]) -> Start:
    def call(retain: Sequence[Any] = (), *, moved: float = 0.02, **settings: Any) -> Started:
        context = make_context()
        context = dataclasses.replace(context, model=original(), retain=[*context.retain, *retain])
        objective = METHODS[request.param](**settings).start(context)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in objective.parameters.values():
                parameter += moved * torch.randn(parameter.shape, generator=generator)
        return Started(context, objective, original())

    return call


@pytest.fixture
def random_rows(tokenizer: Any) -> list[Any]:
    return random_examples(2, tokenizer, 10**6, 32, seed=0)


def rows_of(started: Started, side: str, *rows: int) -> Batch:
    return collate(getattr(started.context, side), rows, started.context.pad_id)


def forgetting(objective: LogOddsObjective, batch: Batch) -> float:
    return float(objective.loss(batch, None).forget.detach())


def holding(started: Started, batch: Batch) -> float:
    """The retain term, before its weight, summed over what it is a mean of."""
    objective, forget = started.objective, rows_of(started, "forget", 0)
    term = objective.loss(forget, batch).retain
    assert term is not None
    return float(term.detach()) * objective.retain_size(batch) / objective._settings.retain_weight


def huber(x: float, width: float) -> float:
    return x * x / (2 * width) if abs(x) < width else abs(x) - width / 2


def odds_at(nll: float) -> float:
    return -nll - math.log(-math.expm1(-nll))


@pytest.mark.parametrize("tokens", ["all", "answer"])
def test_forgetting_is_bounded_and_holds_retain(start: Start, tokens: Tokens) -> None:
    """Rows in another order than the target was asked in; only forgetting is of some tokens alone."""
    started = start(tokens=tokens, retain_weight=3.0, ceiling=2.0, lens_weight=0)
    forget, retain = rows_of(started, "forget", 4, 1, 0), rows_of(started, "retain", 2, 0, 1)
    terms = started.objective.loss(forget, retain)
    assert terms.retain is not None
    now = started.log_odds(forget, tokens)
    before = started.log_odds(forget, tokens, before=True)
    # A token that the target gave less than exp(-2) is not made more likely.
    assert tokens != "all" or min(before) < odds_at(2.0) < max(before)
    away = [a - min(b, odds_at(2.0)) for a, b in zip(now, before, strict=True)]
    expected = sum(huber(x, FORGET_WIDTH) for x in away) / len(away)
    # Float32 passes; the slow way's are the same.
    assert float(terms.forget.detach()) == pytest.approx(expected, rel=1e-4)
    assert started.objective.forget_size(forget) == len(now)
    # Retain tokens are held at the odds that they had.
    now, before = started.log_odds(retain, "all"), started.log_odds(retain, "all", before=True)
    drifts = iter(huber(a - b, RETAIN_WIDTH) for a, b in zip(now, before, strict=True))
    expected, whole = 0.0, 0.0
    for row, example in enumerate(retain.examples):  # half of each the prompt's, half the answer's
        sides: dict[bool, list[float]] = {True: [], False: []}
        for answer in retain.answer_mask[row, 1 : len(example)].tolist():
            sides[answer].append(next(drifts))
        assert all(sides.values())
        size = math.sqrt(sum(map(len, sides.values())))
        expected += 3 * size * sum(sum(side) / len(side) for side in sides.values()) / 2
        whole += size
    expected /= whole
    assert expected > 0  # the weights have moved
    assert float(terms.retain.detach()) == pytest.approx(expected, rel=1e-3)


def test_what_is_unlikely_enough_is_left_alone(make_context: Contexts) -> None:
    """At the target, where no token is as likely as it may be: the limit of a low ceiling."""
    objective = Spectral(ceiling=1e-3, lens_weight=0).start(make_context())
    batch = collate(make_context().forget, [0, 1], 1)
    term = objective.loss(batch, None).total
    # The same float32 pass, batched otherwise.
    assert float(term.detach()) == pytest.approx(0.0, abs=1e-6)
    term.backward()
    for name, parameter in objective.parameters.items():
        assert parameter.grad is not None
        assert float(parameter.grad.abs().max()) < 1e-4, name


def test_at_the_target_nothing_is_to_be_held_back(
    make_context: Contexts, random_rows: list[Any]
) -> None:
    context = make_context()
    context = dataclasses.replace(context, retain=[*context.retain, *random_rows])
    objective = Spectral().start(context)
    batch = collate(context.retain, range(len(context.retain)), context.pad_id)
    term = objective.loss(collate(context.forget, [0], 1), batch).retain
    assert term is not None
    assert float(term.detach()) == pytest.approx(0.0, abs=1e-6)


def slow_kl(log_q: torch.Tensor, log_p: torch.Tensor, kept: int) -> float:
    """KL(q || p) of the `kept` likeliest of q and one outcome for all the others, by the definition."""
    order = log_q.argsort(descending=True).tolist()
    groups = [[token] for token in order[:kept]] + [order[kept:]]
    total = 0.0
    for group in groups:
        a, b = (float(log[group].exp().sum()) for log in (log_q, log_p))
        total += a * (math.log(a) - math.log(b))
    return total


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_random_rows_hold_the_targets_predictions(
    start: Start, random_rows: list[Any], weight: float
) -> None:
    """Odds of the user's rows, by the root of their size; KL to the target of random ones, by tokens."""
    started = start(random_rows, retain_weight=3.0, random_weight=weight)
    tokens: dict[bool, list[float]] = {True: [], False: []}
    for example in started.context.retain:
        size = sum(example.token_mask[1:])
        tokens[example.listed].append(math.sqrt(size) if example.listed else size)
    # A step of 4 retain rows and 3 written ones: together these weigh `weight` times as much.
    listed, written = (sum(side) / len(side) for side in (tokens[True], tokens[False]))
    assert started.objective.written_weight * 3 * written == pytest.approx(weight * 4 * listed)
    weight = started.objective.written_weight
    count = len(started.context.retain)
    random = rows_of(started, "retain", count - 1, count - 2)
    before, now = started.log_probs(random, before=True), started.log_probs(random)
    assert before.shape[-1] > 65
    where = random.token_mask[:, 1:]
    kept = torch.cat([started.objective._said[row][0] for row in random.row_ids])
    torch.testing.assert_close(kept.double(), before[where].topk(64).values, rtol=1e-4, atol=1e-4)
    pairs = list(zip(before[where], now[where], strict=True))
    expected = sum(slow_kl(q, p, 64) for q, p in pairs)
    assert 0 < expected < sum(float((q.exp() * (q - p)).sum()) for q, p in pairs)
    assert holding(started, random) == pytest.approx(weight * expected, rel=1e-3)
    # Each kind counts as it does alone, wherever its rows stand in the batch.
    users = rows_of(started, "retain", 0, 1)
    mixed = rows_of(started, "retain", count - 1, 0, count - 2, 1)
    assert started.objective.retain_size(mixed) == pytest.approx(
        weight * len(pairs) + sum(math.sqrt(sum(e.token_mask[1:])) for e in users.examples)
    )
    found = holding(started, users) + weight * expected
    assert holding(started, mixed) == pytest.approx(found, rel=1e-3)


def test_random_rows_that_weigh_nothing_may_stand_alone(start: Start, random_rows: list[Any]) -> None:
    started = start(random_rows, random_weight=0.0)
    count = len(started.context.retain)
    batch = rows_of(started, "retain", count - 1)
    term = started.objective.loss(rows_of(started, "forget", 0), batch).retain
    assert term is not None
    assert float(term.detach()) == 0


def test_a_batch_is_the_weighted_mean_of_its_parts(start: Start, random_rows: list[Any]) -> None:
    """Micro-batches: the weight is the share of what each term is a mean over."""
    started = start(random_rows, tokens="content")
    objective = started.objective
    last = len(started.context.retain) - 1
    forget, retain = rows_of(started, "forget", 0, 1, 2), rows_of(started, "retain", last, 0, 1)

    def terms(*rows: slice) -> list[tuple[float, float]]:
        found = []
        for part in rows:
            sides = [batch.rows(part.start, part.stop) for batch in (forget, retain)]
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                loss = objective.loss(*sides)
            assert loss.retain is not None
            sizes = objective.forget_size(sides[0]), objective.retain_size(sides[1])
            found.append(
                (float(loss.forget.detach()) * sizes[0], float(loss.retain.detach()) * sizes[1])
            )
        return found

    [whole] = terms(slice(0, 3))
    parts = terms(slice(0, 1), slice(1, 3))
    assert [sum(side) for side in zip(*parts, strict=True)] == pytest.approx(whole, rel=1e-4)


def test_no_step_runs_the_target(start: Start, random_rows: list[Any]) -> None:
    """One pass over rows of each kind: what the target says was kept, without a second model."""
    started = start(random_rows)
    assert not started.objective._frozen
    passes = []
    started.context.model.model.register_forward_hook(lambda *_: passes.append(1))
    last = len(started.context.retain) - 1
    for rows, count in (((0, 1), 2), ((last, last - 1), 2), ((0, last, 1), 3)):
        passes.clear()
        started.objective.loss(rows_of(started, "forget", 0, 1), rows_of(started, "retain", *rows))
        assert len(passes) == count


def test_the_default_ceiling_is_below_guessing(start: Start) -> None:
    started = start()
    vocabulary = started.context.model.config.vocab_size
    assert started.objective.ceiling == pytest.approx(0.8 * math.log(vocabulary))
    assert started.objective.notes()["ceiling"] == started.objective.ceiling


def pair_of(losses: Sequence[float], surprise: Sequence[float]) -> Pair:
    """A never-seen document with these tokens, and a forget document that has reached them."""
    spread = token_spread(RowTokens(torch.tensor(losses), torch.tensor(surprise)))
    return Pair(spread, spread)


def surprise_of(started: Started, batch: Batch) -> list[float]:
    """By min-k%++ itself, one token at a time."""
    found = []
    log_p = started.log_probs(batch)[batch.token_mask[:, 1:]]
    targets = batch.input_ids[:, 1:][batch.token_mask[:, 1:]]
    for line, target in zip(log_p, targets.tolist(), strict=True):
        mean = float((line.exp() * line).sum())
        deviation = float((line.exp() * (line - mean).square()).sum().sqrt())
        moments = torch.tensor([mean]), torch.tensor([deviation])
        found.append(math.asinh(-float(min_k_plus_plus(line[target][None], *moments))))
    return found


def test_tokens_of_a_calibrated_document_take_the_losses_of_a_never_seen_one(start: Start) -> None:
    settings: dict[str, Any] = {"retain_weight": 0, "lens_weight": 0, "moved": 0.1}
    started = start(**settings)
    batch, other = rows_of(started, "forget", 0), rows_of(started, "forget", 1)
    before, now = started.log_odds(batch, "all", before=True), started.log_odds(batch, "all")
    never = torch.linspace(0.2, 6.0, len(now)).tolist()
    # As surprising as wanted already: what is left is the distance of the log-odds.
    pair = pair_of(never, surprise_of(started, batch))
    row = batch.row_ids[0]
    started.objective.calibrate(NeverSeen({row: 0.0}, {row: 3.1}, {row: pair}))
    # The likeliest token is to have the least of the losses, and none is made likelier than it was.
    likeliest_first = sorted(range(len(now)), key=now.__getitem__, reverse=True)
    wanted = dict(zip(likeliest_first, map(odds_at, never), strict=True))
    away = [now[n] - min(wanted[n], before[n]) for n in range(len(now))]
    expected = sum(huber(x, FORGET_WIDTH) for x in away) / len(away)
    # Quantiles at 128 ranks and back.
    assert forgetting(started.objective, batch) == pytest.approx(expected, rel=0.01)
    # Of a row that nothing is known of the prompt goes as far as other text, the answer a third further.
    now, before = started.log_odds(other, "all"), started.log_odds(other, "all", before=True)
    answers = other.answer_mask[:, 1:][other.token_mask[:, 1:]].tolist()
    assert 0 < sum(answers) < len(answers)
    assert started.objective.ceiling > 1.35 * 3.1
    ends = [1.35 * 3.1 if answer else 3.1 for answer in answers]
    away = [a - min(odds_at(end), b) for a, b, end in zip(now, before, ends, strict=True)]
    expected = sum(huber(x, FORGET_WIDTH) for x in away) / len(away)
    assert forgetting(started.objective, other) == pytest.approx(expected, rel=1e-4)


def test_a_token_is_to_be_as_surprising_as_one_of_never_seen_text(start: Start) -> None:
    both = [start(retain_weight=0, lens_weight=0, moved=0.1) for _ in range(2)]
    batch = rows_of(both[0], "forget", 0)
    row = batch.row_ids[0]
    now = surprise_of(both[0], batch)
    count = len(now)
    # Wanted in another order than the text's: ranks decide which token is to have which.
    never = torch.linspace(-3, 3, count).flip(0).tolist()
    found = []
    for started, surprise in zip(both, (now, never), strict=True):
        pair = pair_of([3.0] * count, surprise)
        started.objective.calibrate(NeverSeen({row: 0.0}, {row: 3.0}, {row: pair}))
        found.append(forgetting(started.objective, batch))
    wanted = dict(zip(sorted(range(count), key=now.__getitem__), sorted(never), strict=True))
    away = [_SURPRISE_WEIGHT * huber(now[n] - wanted[n], 1) for n in range(count)]
    # Quantiles at 128 ranks and back.
    assert found[1] - found[0] == pytest.approx(sum(away) / count, rel=0.02)


def test_what_a_layer_inside_knows_is_pushed_as_well(start: Start) -> None:
    """One way: what is less likely inside than it may be at the output is left alone."""
    settings: dict[str, Any] = {"retain_weight": 0, "ceiling": 2.0, "moved": 0.005}
    plain = start(lens_weight=0, **settings)
    batch = rows_of(plain, "forget", 0, 1, 2, 3, 4)
    expected = forgetting(plain.objective, batch)
    started = start(lens_weight=0.7, **settings)
    layer = started.objective._inner_layer()
    with torch.no_grad():
        states = started.context.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            output_hidden_states=True,
        ).hidden_states[layer + 1]
        inner = started.context.model.lm_head(started.context.model.model.norm(states))
    mask = batch.token_mask[:, 1:]
    log_probs = inner[:, :-1].double().log_softmax(-1).gather(2, batch.input_ids[:, 1:, None])
    odds = torch.logit(log_probs[..., 0][mask].exp())
    before = torch.tensor(started.log_odds(batch, "all", before=True))
    excess = (odds - before.clamp(max=odds_at(2.0))).clamp(min=0)
    assert 0 < int((excess > 0).sum()) < len(excess)
    term = sum(huber(x, FORGET_WIDTH) for x in excess.tolist()) / len(excess)
    found = forgetting(started.objective, batch)
    assert found - expected == pytest.approx(0.7 * term, rel=1e-3)


def test_a_single_layer_has_none_inside(make_context: Contexts) -> None:
    found = []
    for weight in (0.0, 5.0):
        context = make_context(layers=1)
        shaken(context.model)
        objective = Spectral(lens_weight=weight).start(context)
        found.append(forgetting(objective, collate(context.forget, [0], context.pad_id)))
    assert found[0] == found[1] > 0


def test_every_layer_inside_has_its_turn(make_context: Contexts) -> None:
    context = make_context()
    objective = Spectral().start(context)
    objective._layout = dataclasses.replace(objective._layout, count=33)
    drawn = []
    for step in range(1, 200):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.generator(f"step {step}").initial_seed() % 2**63)
            drawn.append(objective._inner_layer())
            assert objective._inner_layer() == drawn[-1]  # in every micro-batch
    assert set(drawn) == set(range(32))
    assert max(map(drawn.count, drawn)) < 20  # 6.2 expected


def test_calibration_is_put_back_as_it_was(start: Start) -> None:
    started = start()
    batch = rows_of(started, "forget", 0)
    row, other = batch.row_ids[0], started.context.forget[1].row_id
    pairs = {
        row: pair_of([0.5, 1.0, 4.0], [1.5, 1.0, 0.5]),
        other: pair_of([2.0, 3.0], [2.5, 1.0]),
    }
    started.objective.calibrate(NeverSeen({row: 1.0, other: 1.0}, {row: 2.0, other: 3.0}, pairs))
    expected = forgetting(started.objective, batch)
    saved = json.loads(json.dumps(started.objective.calibration))
    tensors = {name: tensor.clone() for name, tensor in started.objective.state_tensors.items()}
    again = start().objective
    assert again.state_tensors == {}
    assert forgetting(again, batch) != pytest.approx(expected, rel=1e-3)
    again.restore(saved, tensors)
    assert forgetting(again, batch) == expected
    assert again.calibration == started.objective.calibration
    assert again.state_tensors.keys() == tensors.keys()
    for name, tensor in again.state_tensors.items():
        assert torch.equal(tensor, tensors[name]), name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("settings", "option"),
    [
        ({"lens_weight": -0.5}, "--method.lens-weight"),
        ({"random_rows": -1}, "--method.random-rows"),
        ({"random_weight": -0.1}, "--method.random-weight"),
        ({"ceiling": -1.0}, "--method.ceiling"),
        ({"ceiling": 0.0}, "--method.ceiling"),
        ({"retain_weight": -1.0}, "--method.retain-weight"),
        ({"lens_weight": math.nan}, "--method.lens-weight"),
    ],
)
def test_settings_that_cannot_be_are_refused(method: str, settings: dict[str, Any], option: str) -> None:
    with pytest.raises(InputError, match=option):
        METHODS[method](**settings)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_matched_is_what_is_forgotten(method: str) -> None:
    for tokens in ("all", "answer", "content"):
        assert METHODS[method](tokens=tokens).matches_tokens == tokens
