"""Every formula against a slow reference, at its limits and on an algebraic property."""

from __future__ import annotations

import math

import pytest
import torch

from expunge.maths import numerics
from expunge.maths.losses import (
    adaptive_target,
    cross_entropy,
    huber,
    log_odds_at,
    npo,
    simnpo,
    steer,
    token_kl,
    top_kl,
    unit_direction,
)
from expunge.maths.numerics import (
    masked_mean,
    row_means,
    row_sums,
    target_log_odds,
    target_log_probs,
    target_moments,
    target_surprise,
    token_log_probs,
)

ROWS, TOKENS, VOCABULARY, WIDTH = 3, 5, 7, 4


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def logits(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(ROWS, TOKENS, VOCABULARY, generator=generator)


@pytest.fixture
def ids(generator: torch.Generator) -> torch.Tensor:
    return torch.randint(VOCABULARY, (ROWS, TOKENS), generator=generator)


@pytest.fixture
def mask() -> torch.Tensor:
    return torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 0], [0, 1, 1, 0, 0]], dtype=torch.bool)


def test_token_log_probs_are_those_of_the_next_token(logits: torch.Tensor, ids: torch.Tensor) -> None:
    found = token_log_probs(logits, ids)
    for row in range(ROWS):
        for place in range(TOKENS - 1):
            exponentials = [math.exp(float(v)) for v in logits[row, place]]
            share = exponentials[int(ids[row, place + 1])] / sum(exponentials)
            # One float32 log-softmax against float64 arithmetic.
            assert float(found[row, place]) == pytest.approx(math.log(share), abs=1e-5)


def test_masked_values_never_count(mask: torch.Tensor, generator: torch.Generator) -> None:
    values = torch.randn(ROWS, TOKENS, generator=generator)
    poisoned = torch.where(mask, values, torch.full_like(values, math.nan))
    chosen = [float(values[r, t]) for r in range(ROWS) for t in range(TOKENS) if mask[r, t]]
    assert float(masked_mean(poisoned, mask)) == pytest.approx(sum(chosen) / len(chosen), abs=1e-6)
    assert torch.equal(row_sums(poisoned, mask), row_sums(values, mask))
    assert not torch.isnan(row_means(poisoned, mask)).any()


def test_an_empty_mask_gives_zero() -> None:
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert float(masked_mean(torch.ones(2, 3), nothing)) == 0
    assert row_means(torch.ones(2, 3), nothing).tolist() == [0, 0]


def test_log_odds_of_a_token_known_by_heart() -> None:
    logits = torch.tensor([[60.0, 0.0, 0.0], [1.0, 2.0, 3.0]], requires_grad=True)
    found = target_log_odds(logits, torch.tensor([0, 2]))
    # log p is exactly 0 in float32 where the log-odds are 60 - log 2.
    assert found.tolist() == pytest.approx([60 - math.log(2), 3 - math.log(math.e + math.e**2)])
    found.sum().backward()
    assert logits.grad is not None
    assert logits.grad[0, 0] == logits.grad[1, 2] == 1
    assert logits.grad.sum(1).tolist() == pytest.approx([0, 0], abs=1e-6)


def test_log_odds_at_a_loss_by_arithmetic() -> None:
    losses = [1e-3, 0.1, math.log(2), 6.6, 40.0]
    for nll, found in zip(losses, log_odds_at(torch.tensor(losses)).tolist(), strict=True):
        p = math.exp(-nll)
        # float32 holds 1 - p of the smallest loss to 1e-4 of itself.
        assert found == pytest.approx(math.log(p / (1 - p)), abs=1e-4)


def test_hubers_distance_by_arithmetic() -> None:
    wanted = [0.0, 1.0, -3.0, 10.0, 2.0]
    log_odds = [0.0, 2.0, -3.5, -8.0, 2.0 + 2.0]
    slow = [
        x * x / (2 * 2.0) if x < 2 else x - 1.0
        for x in (abs(a - b) for a, b in zip(log_odds, wanted, strict=True))
    ]
    found = huber(torch.tensor(log_odds), torch.tensor(wanted), 2.0)
    assert found.tolist() == pytest.approx(slow)
    assert huber(torch.zeros(0), torch.zeros(0), 2.0).tolist() == []


def test_hubers_distance_pulls_alike_from_both_sides_and_not_at_its_aim() -> None:
    for shift, gradient in ((-30.0, -1.0), (-1.0, -0.5), (0.0, 0.0), (1.0, 0.5), (30.0, 1.0)):
        log_odds = torch.tensor([2.0 + shift], requires_grad=True)
        huber(log_odds, torch.tensor([2.0]), 2.0).sum().backward()
        assert log_odds.grad is not None
        assert float(log_odds.grad) == pytest.approx(gradient)


def test_kl_against_a_sum_over_the_vocabulary(logits: torch.Tensor, mask: torch.Tensor) -> None:
    reference = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    total, count = 0.0, 0
    for row in range(ROWS):
        for place in range(TOKENS - 1):
            if mask[row, place + 1]:
                q = reference[row, place].double().softmax(0)
                p = logits[row, place].double().softmax(0)
                total += float((q * (q / p).log()).sum())
                count += 1
    where = mask[:, 1:]
    found = token_kl(logits[:, :-1][where], reference[:, :-1][where])
    assert float(found.sum()) == pytest.approx(total, rel=1e-5)
    assert len(found) == count
    assert token_kl(logits, logits).abs().max() < 1e-6


def top_of(reference: torch.Tensor, kept: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-probabilities of each line's likeliest tokens, and their ids."""
    top = reference.log_softmax(-1).topk(kept)
    return top.values, top.indices


@pytest.mark.parametrize("kept", [1, 3, VOCABULARY - 1])
def test_kl_of_the_likeliest_tokens_against_a_sum_over_outcomes(logits: torch.Tensor, kept: int) -> None:
    """All the others are one outcome, whose probability is the sum of theirs."""
    reference = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    lines, references = logits.flatten(0, 1), reference.flatten(0, 1)
    found = top_kl(lines, *top_of(references, kept))
    assert found.shape == (ROWS * TOKENS,)
    for line, other, value in zip(lines.double(), references.double(), found, strict=True):
        p, q = line.softmax(0).tolist(), other.softmax(0).tolist()
        order = sorted(range(VOCABULARY), key=q.__getitem__, reverse=True)
        outcomes = [[token] for token in order[:kept]] + [order[kept:]]
        sums = [(sum(q[t] for t in group), sum(p[t] for t in group)) for group in outcomes]
        # Float32, where the rest is what is left of 1.
        assert float(value) == pytest.approx(sum(a * math.log(a / b) for a, b in sums), abs=1e-5)


def test_kl_of_the_likeliest_tokens_grows_to_that_of_all(logits: torch.Tensor) -> None:
    reference = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    lines, references = 3 * logits.flatten(0, 1), 3 * reference.flatten(0, 1)
    whole = token_kl(lines, references)
    least = torch.zeros_like(whole)
    for kept in range(1, VOCABULARY):
        found = top_kl(lines, *top_of(references, kept))
        assert bool((found >= least - 1e-5).all())  # float32's rounding
        least = found
    assert bool((top_kl(lines, *top_of(references, 2)) < whole - 1e-3).any())
    # One token alone is left, which is an outcome by itself.
    torch.testing.assert_close(least, whole, rtol=1e-4, atol=1e-5)


def test_kl_of_the_likeliest_tokens_is_nothing_between_equals_and_finite_by_heart() -> None:
    generator = torch.Generator().manual_seed(2)
    even = torch.randn(4, 50, generator=generator)
    by_heart = torch.zeros(1, 50)
    by_heart[0, 3] = 80.0  # nothing is left for the others in float32
    for logits in (even, by_heart):
        assert top_kl(logits, *top_of(logits, 8)).abs().max() < 1e-5
    moved = torch.randn(1, 50, generator=generator).requires_grad_()
    top_kl(moved, *top_of(by_heart, 8)).sum().backward()
    assert moved.grad is not None
    # As that of the cross-entropy of a token that is certain: p - 1 at it, p elsewhere.
    expected = moved.detach().softmax(-1)
    expected[0, 3] -= 1
    torch.testing.assert_close(moved.grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kept", [1, 8, 49])
def test_the_gradient_of_that_kl_is_the_models_probabilities_less_the_merged_ones(
    kept: int,
) -> None:
    """p - q of a token that is kept; of another p times (1 - Q / P), of what all of these have."""
    generator = torch.Generator().manual_seed(3)
    logits, reference = (torch.randn(3, 50, generator=generator) for _ in range(2))
    logits.requires_grad_()
    values, chosen = top_of(reference, kept)
    top_kl(logits, values, chosen).sum().backward()
    p, q = logits.detach().softmax(-1), reference.softmax(-1)
    rest = torch.ones_like(p).scatter(-1, chosen, 0.0)
    share = (q * rest).sum(-1, keepdim=True) / (p * rest).sum(-1, keepdim=True)
    assert logits.grad is not None
    expected = torch.where(rest.bool(), p * (1 - share), p - q)
    torch.testing.assert_close(logits.grad, expected, rtol=1e-4, atol=1e-6)


def test_npo_against_its_definition() -> None:
    log_prob, reference = torch.tensor([-3.0, -9.0]), torch.tensor([-4.0, -2.0])
    beta = 0.3
    ratios = [math.exp(a - b) ** beta for a, b in zip(log_prob, reference, strict=True)]
    expected = 2 / beta * sum(math.log(1 + ratio) for ratio in ratios) / 2
    assert float(npo(log_prob, reference, beta)) == pytest.approx(expected, rel=1e-5)


def test_npo_tends_to_gradient_ascent_as_beta_vanishes() -> None:
    reference = torch.tensor([-4.0, -2.0])
    log_prob = torch.tensor([-3.0, -9.0], requires_grad=True)
    npo(log_prob, reference, 1e-4).backward()
    assert log_prob.grad is not None
    # Gradient ascent's gradient in the mean of two rows' log-probability is 1/2 each.
    assert log_prob.grad.tolist() == pytest.approx([0.5, 0.5], abs=1e-3)


def test_npo_weighs_rows_that_are_still_known_more() -> None:
    log_prob = torch.tensor([-1.0, -200.0], requires_grad=True)
    npo(log_prob, torch.tensor([-1.0, -1.0]), 0.1).backward()
    assert log_prob.grad is not None
    assert float(log_prob.grad[0]) > 1e6 * float(log_prob.grad[1])


def test_simnpo_against_its_definition() -> None:
    mean, beta, gamma = -1.5, 2.5, 0.2
    sigmoid = 1 / (1 + math.exp(-(-beta * mean - gamma)))
    found = simnpo(torch.tensor([mean]), beta, gamma)
    assert float(found) == pytest.approx(-2 / beta * math.log(sigmoid), rel=1e-5)


def test_steer_against_loops(mask: torch.Tensor, generator: torch.Generator) -> None:
    hidden = torch.randn(ROWS, TOKENS, WIDTH, generator=generator)
    target = torch.randn(ROWS, TOKENS, WIDTH, generator=generator)
    distances = [
        sum(float(hidden[r, t, d] - target[r, t, d]) ** 2 for d in range(WIDTH)) / WIDTH
        for r in range(ROWS)
        for t in range(TOKENS)
        if mask[r, t]
    ]
    expected = sum(distances) / len(distances)
    assert float(steer(hidden, target, mask)) == pytest.approx(expected, rel=1e-5)
    assert float(steer(hidden, hidden, mask)) == 0


def test_adaptive_target_has_each_tokens_own_frozen_norm(generator: torch.Generator) -> None:
    norms = torch.rand(TOKENS, generator=generator) + 0.1
    directions = torch.stack([unit_direction(WIDTH, "gaussian", generator) for _ in range(TOKENS)])
    target = adaptive_target(norms, directions, beta=5.0)
    torch.testing.assert_close(target.norm(dim=-1), 5 * norms)
    cosine = torch.nn.functional.cosine_similarity(target, directions, dim=-1)
    torch.testing.assert_close(cosine, torch.ones(TOKENS))
    # Twice as long a frozen state, twice as far a target: the scale adapts to the model's.
    torch.testing.assert_close(adaptive_target(2 * norms, directions, 5.0), 2 * target)


def test_gaussian_directions_are_unrelated_and_uniform_ones_are_not() -> None:
    generator = torch.Generator().manual_seed(0)
    for kind, low, high in (("gaussian", -0.15, 0.15), ("uniform", 0.7, 0.8)):
        a, b = (unit_direction(4096, kind, generator) for _ in range(2))
        assert float(a.norm()) == pytest.approx(1, abs=1e-5)
        assert low < float(a @ b) < high


@pytest.mark.parametrize("loss", ["cross entropy", "odds", "kl", "npo", "simnpo"])
def test_a_batch_is_the_weighted_mean_of_its_parts(
    loss: str, logits: torch.Tensor, mask: torch.Tensor, generator: torch.Generator
) -> None:
    """Micro-batches: the weight is the share of counted tokens, or of rows for NPO and SimNPO."""
    others = torch.randn(logits.shape, generator=generator)
    log_probs, counted = -logits.abs()[..., 0], mask

    def of(rows: slice) -> tuple[torch.Tensor, int]:
        chosen, kept = log_probs[rows], counted[rows]
        count = len(chosen)
        if loss == "npo":
            return npo(row_sums(chosen, kept), row_sums(others[rows, :, 0], kept), 0.3), count
        if loss == "simnpo":
            return simnpo(row_means(chosen, kept), 2.0, 0.1), count
        if loss == "kl":
            tokens = int(kept[:, 1:].sum())
            where = kept[:, 1:]
            return token_kl(logits[rows, :-1][where], others[rows, :-1][where]).mean(), tokens
        if loss == "odds":
            distances = huber(chosen[kept], others[rows, :, 0][kept], 2.0)
            return distances.mean(), int(kept.sum())
        return cross_entropy(chosen, kept), int(kept.sum())

    whole, total = of(slice(0, ROWS))
    parts = [of(slice(0, 2)), of(slice(2, ROWS))]
    found = sum(float(value) * count / total for value, count in parts)
    assert found == pytest.approx(float(whole), rel=1e-5)


def test_moments_are_those_of_the_models_own_distribution() -> None:
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 8, 3, 3])
    log_p, mean, deviation = target_moments(logits, targets)
    assert log_p.tolist() == pytest.approx(target_log_probs(logits, targets).tolist(), abs=1e-6)
    for line in range(4):
        weights = [math.exp(float(v)) for v in logits[line]]
        p = [w / sum(weights) for w in weights]
        expected = sum(q * math.log(q) for q in p)
        spread = math.sqrt(sum(q * (math.log(q) - expected) ** 2 for q in p))
        assert float(mean[line]) == pytest.approx(expected, abs=1e-5)
        assert float(deviation[line]) == pytest.approx(spread, abs=1e-5)
    _, even, none = target_moments(torch.zeros(1, 8), torch.tensor([1]))
    assert float(even) == pytest.approx(-math.log(8))
    assert float(none) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("rows", [1, 5])
def test_gradients_are_those_of_the_plain_formulas(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics, "_PIECE", {"cpu": 9 * rows})
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(5, 9, generator=generator) * 4
    logits[0, 3] = 40.0  # known by heart
    targets = torch.tensor([3, 3, 0, 8, 5])
    reference, chosen = top_of(torch.randn(5, 9, generator=generator), 3)

    def plain(x: torch.Tensor) -> list[torch.Tensor]:
        log_p = x.log_softmax(1)
        p = log_p.exp()
        at = log_p.gather(1, targets[:, None])[:, 0]
        mean = (p * log_p).sum(1)
        deviation = (p * (log_p - mean[:, None]).square()).sum(1).sqrt()
        others = x.scatter(1, targets[:, None], -torch.inf).logsumexp(1)
        rest = log_p.scatter(1, chosen, -torch.inf).logsumexp(1)
        q = reference.double().exp()
        left = 1 - q.sum(1)
        kl = (q * (q.log() - log_p.gather(1, chosen))).sum(1) + left * (left.log() - rest)
        return [x.gather(1, targets[:, None])[:, 0] - others, at, mean, deviation, kl]

    def ours(x: torch.Tensor) -> list[torch.Tensor]:
        odds = target_log_odds(x, targets)
        return [odds, *target_moments(x, targets), top_kl(x, reference, chosen)]

    weights = torch.randn(5, 5, generator=generator)  # another one for every value
    for number, weight in enumerate(weights):
        slow, fast = logits.double().requires_grad_(), logits.clone().requires_grad_()
        (weight * plain(slow)[number]).sum().backward()
        (weight * ours(fast)[number]).sum().backward()
        assert slow.grad is not None
        assert fast.grad is not None
        # float32 against float64; the deviation of a token known by heart is 1e-7 of its logits.
        kept = slice(1, None) if number == 3 else slice(None)
        assert torch.allclose(fast.grad[kept].double(), slow.grad[kept], atol=2e-5), number


def test_surprise_has_a_gradient_where_a_token_is_known_by_heart_or_masked() -> None:
    logits = torch.tensor([[80.0, 0.0, -1.0], [0.0, -torch.inf, 1.0], [30.0, 0.0, 0.0]])
    logits.requires_grad_()
    targets = torch.tensor([0, 2, 1])
    surprise = target_surprise(logits, targets)
    surprise.sum().backward()
    found = surprise.detach()
    assert float(found[0]) == pytest.approx(0.0, abs=1e-3)
    # Certain of another token: nothing is more surprising, and the push stays bounded.
    assert float(found[2]) > 5
    assert logits.grad is not None
    assert bool(torch.isfinite(logits.grad).all())
    assert float(logits.grad.abs().max()) <= 2


@pytest.mark.parametrize("rows", [1, 3, 7, 20])
def test_pieces_give_values_and_gradients_of_the_whole(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(20, 11, generator=generator) * 3
    targets = torch.randint(11, (20,), generator=generator)
    reference = torch.randn(20, 11, generator=generator)
    top = top_of(reference, 4)

    def everything() -> torch.Tensor:
        inputs = logits.clone().requires_grad_()
        values = [
            target_log_probs(inputs, targets),
            target_log_odds(inputs, targets),
            target_surprise(inputs, targets),
            *target_moments(inputs, targets),
            token_kl(inputs, reference),
            top_kl(inputs, *top),
        ]
        torch.stack([(index + 1) * value.sum() for index, value in enumerate(values)]).sum().backward()
        assert inputs.grad is not None
        return torch.cat([torch.stack(values, 1).detach(), inputs.grad], 1)

    monkeypatch.setattr(numerics, "_PIECE", {"cpu": 1000})
    whole = everything()
    monkeypatch.setattr(numerics, "_PIECE", {"cpu": 11 * rows})
    assert everything().equal(whole)
