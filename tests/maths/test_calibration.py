"""Forget rows beside never-seen ones: matched by rank, inside their task, and only as far as needed."""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Callable

import numpy
import pytest
import torch

from expunge.data.batches import collate
from expunge.maths.calibration import (
    POINTS,
    NeverSeen,
    Pair,
    RowTokens,
    TokenSpread,
    at_ranks,
    counterparts,
    matched_by_rank,
    never_seen,
    token_spread,
)
from expunge.maths.losses import adaptive_target
from expunge.maths.membership import membership_auc
from expunge.methods.adaptive_rmu import AdaptiveRMU
from expunge.methods.aims import Aims
from expunge.methods.base import Context
from expunge.methods.libu import LIBU

Contexts = Callable[..., Context]


def area_between(one: dict[str, float], other: dict[str, float]) -> float:
    """The area between two cumulative distributions, which is their 1-Wasserstein distance."""
    places = sorted([*one.values(), *other.values()])
    area = 0.0
    for left, right in itertools.pairwise(places):
        shares = [sum(v <= left for v in side.values()) / len(side) for side in (one, other)]
        area += (right - left) * abs(shares[0] - shares[1])
    return area


def losses(prefix: str, count: int, mean: float, seed: int) -> dict[str, float]:
    draw = random.Random(seed)
    return {f"{prefix}{index}": draw.gauss(mean, 1.0) for index in range(count)}


def test_values_keep_their_order_and_take_the_others_distribution() -> None:
    values = [3.0, 1.0, 2.0]
    assert matched_by_rank(values, [10.0, 20.0, 30.0]) == pytest.approx([26.667, 13.333, 20.0], abs=1e-3)
    assert matched_by_rank(values, [5.0]) == [5.0, 5.0, 5.0]


def test_a_set_is_matched_with_itself() -> None:
    same = losses("a", 40, 2.0, seed=0)
    twins = {f"twin of {row}": loss for row, loss in same.items()}
    compared = never_seen(same, twins, dict.fromkeys([*same, *twins], "t"))
    # The quantiles of n values at (i + 1/2) / n, interpolated, are nearly those values.
    assert compared.distance < 0.05


def test_the_distance_is_wassersteins() -> None:
    members, others = losses("m", 500, 1.0, seed=1), losses("n", 500, 4.0, seed=2)
    compared = never_seen(members, others, dict.fromkeys([*members, *others], "t"))
    assert compared.distance == pytest.approx(area_between(members, others), rel=0.02)


def test_rows_with_the_wanted_losses_cannot_be_told_apart() -> None:
    members, others = losses("m", 60, 0.1, seed=1), losses("n", 90, 4.0, seed=2)
    compared = never_seen(members, others, dict.fromkeys([*members, *others], "t"))
    assert membership_auc(list(members.values()), list(others.values())) > 0.95
    reached = list(compared.wanted.values())
    assert membership_auc(reached, list(others.values())) == pytest.approx(0.5, abs=0.01)


def test_tasks_are_compared_apart_where_they_have_enough_rows() -> None:
    members = {"m1": 0.0, "m2": 0.0, "m3": 0.0}
    stories, profiles = losses("s", 8, 6.0, seed=3), losses("p", 7, 1.0, seed=4)
    groups = {**dict.fromkeys(stories, "story"), **dict.fromkeys(profiles, "profile")}
    groups |= {"m1": "story", "m2": "profile", "m3": "letter"}
    wanted = never_seen(members, stories | profiles, groups).wanted
    assert wanted["m1"] == pytest.approx(statistics.median(stories.values()))
    every = sorted([*stories.values(), *profiles.values()])
    # Seven rows are too few: these two tasks share all of them.
    assert every[0] <= wanted["m2"] <= wanted["m3"] <= every[-1]
    assert wanted["m2"] < wanted["m1"]


def far(context: Context, loss: float) -> NeverSeen:
    rows = {example.row_id: loss for example in context.forget[:2]}
    return NeverSeen(rows, dict.fromkeys(rows, 4.0))


def test_a_steered_row_goes_no_further_than_it_must(make_context: Contexts) -> None:
    context = make_context()
    objective = AdaptiveRMU(layer=2, calibration_gain=0.5).start(context)
    forget = collate(context.forget, [0, 1, 2], context.pad_id)
    objective.calibrate(far(context, 0.0))
    assert set(objective.calibration.values()) == {1.0}  # not there yet: all the way
    objective.calibrate(far(context, 6.0))
    assert list(objective.calibration.values()) == [
        0.75,
        0.75,
    ]  # 2 of 4 nats too far, half of it back
    norms = objective.hidden.norms_before(forget)
    full = adaptive_target(norms, objective.directions.of_tokens(forget), 5.0)
    weaker = objective.weakened(full, forget)
    start = objective.hidden.before(forget)
    rows = weaker.split(forget.lengths)
    wanted = (0.75 * full + 0.25 * start).split(forget.lengths)
    torch.testing.assert_close(rows[0], wanted[0])
    torch.testing.assert_close(rows[2], full.split(forget.lengths)[2])  # a row that nothing is known of
    for _ in range(5):
        objective.calibrate(far(context, 12.0))
    assert set(objective.calibration.values()) == {0.0}  # back to where it was, no further


def test_rows_that_nothing_is_known_of_go_as_far_as_never_seen_text(make_context: Contexts) -> None:
    context = make_context()
    objective = LIBU(rank=4, ceiling=9.0).start(context)
    objective.calibrate(far(context, 0.0))
    assert objective.calibration["of_prompts"] == 4.0
    assert objective.calibration["of_answers"] == pytest.approx(5.4)


def test_without_a_gain_nothing_moves(make_context: Contexts) -> None:
    context = make_context()
    steered = AdaptiveRMU(layer=2, calibration_gain=0).start(context)
    steered.calibrate(far(context, 9.0))
    assert set(steered.calibration.values()) == {1.0}


def row_tokens(count: int, seed: int, scale: float = 1.0) -> RowTokens:
    generator = torch.Generator().manual_seed(seed)
    losses = scale * torch.rand(count, generator=generator) * 5
    return RowTokens(losses, losses / 2 + torch.rand(count, generator=generator))


@pytest.mark.parametrize("count", [1, 2, 7, POINTS, 3 * POINTS])
def test_quantiles_at_as_many_ranks_as_there_are_values_are_the_values(count: int) -> None:
    values = torch.rand(count, generator=torch.Generator().manual_seed(0)).sort().values
    if count == POINTS:
        torch.testing.assert_close(at_ranks(at_ranks(values, POINTS), count), values)
    found = at_ranks(at_ranks(values, POINTS), count)
    expected = torch.tensor(numpy_quantiles(values, count))
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def numpy_quantiles(values: torch.Tensor, count: int) -> list[float]:
    """By Hazen's rule, of which both are the definition."""
    ranks = (numpy.arange(count) + 0.5) / count
    quantiles: list[float] = numpy.quantile(values.numpy(), ranks, method="hazen").tolist()
    return quantiles


def test_the_spread_of_a_document_is_its_quantile_functions() -> None:
    document = row_tokens(300, 0)
    spread = token_spread(document)
    ranks = (numpy.arange(POINTS) + 0.5) / POINTS
    for found, values in (
        (spread.losses, document.losses),
        (spread.surprise, document.surprise),
    ):
        expected = numpy.quantile(values.numpy(), ranks, method="hazen")
        torch.testing.assert_close(found.double(), torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_each_row_is_paired_with_the_one_at_its_own_rank() -> None:
    rows = list("abcdef")
    assert counterparts(rows, rows) == dict(zip(rows, rows, strict=True))
    assert counterparts(rows, list("xyz")) == dict(zip(rows, "xxyyzz", strict=True))
    assert counterparts(list("xyz"), rows) == {"x": "b", "y": "d", "z": "f"}
    assert counterparts(["a"], list("xyz")) == {"a": "y"}
    assert counterparts([], rows) == {}


def test_what_is_wanted_of_documents_spreads_as_never_seen_ones_do() -> None:
    """None is more usual than they are, by any score: each is to be like one, and all are taken."""
    members, others = losses("m", 40, 0.1, seed=1), losses("n", 40, 4.0, seed=2)
    tokens = {
        row: row_tokens(30, seed, scale=1 + seed % 7) for seed, row in enumerate([*members, *others])
    }
    compared = never_seen(members, others, dict.fromkeys([*members, *others], "t"), tokens)

    def lowest(spread: torch.Tensor) -> float:
        return float(spread[-POINTS // 5 :].mean())

    wanted = [lowest(pair.wanted.surprise) for pair in compared.pairs.values()]
    theirs = [lowest(token_spread(tokens[row]).surprise) for row in others]
    assert sorted(wanted) == pytest.approx(sorted(theirs))
    # The least likely document has the least likely one to be like.
    last, counterpart = (max(side, key=side.__getitem__) for side in (members, others))
    expected = token_spread(tokens[counterpart])
    torch.testing.assert_close(compared.pairs[last].wanted.losses, expected.losses)


def test_tokens_are_compared_inside_the_groups_that_rows_are() -> None:
    members = {"m1": 1.0, "m2": 1.0, "without tokens": 1.0}
    nonmembers = {f"n{index}": 2.0 + index for index in range(9)}
    groups = {**dict.fromkeys([*members, *nonmembers], "story"), "n0": "letter", "m2": "letter"}
    tokens = {row: row_tokens(20, s) for s, row in enumerate(["m1", "m2", *nonmembers])}
    pairs = never_seen(members, nonmembers, groups, tokens).pairs
    # The median of the eight stories, and of all nine texts: too few letters to be compared with.
    for row, other in (("m1", "n5"), ("m2", "n4")):
        expected = token_spread(tokens[other])
        torch.testing.assert_close(pairs[row].wanted.losses, expected.losses)
        reached = token_spread(tokens[row])
        torch.testing.assert_close(pairs[row].reached.surprise, reached.surprise)
    assert set(pairs) == {"m1", "m2"}
    assert never_seen(members, nonmembers, groups).pairs == {}
    without = {row: tokens[row] for row in ("m1", "m2")}
    assert never_seen(members, nonmembers, groups, without).pairs == {}
    # Never-seen rows without tokens have no rank among those that have some.
    few = {**without, "n3": tokens["n3"]}
    found = never_seen(members, nonmembers, groups, few).pairs["m1"].wanted
    torch.testing.assert_close(found.losses, token_spread(tokens["n3"]).losses)


def test_what_is_wanted_follows_the_rank_that_a_row_has_now() -> None:
    others = {"low": 1.0, "high": 5.0}
    tokens = {row: row_tokens(20, seed) for seed, row in enumerate(["a", "b", *others])}
    groups = dict.fromkeys(tokens, "t")
    for losses_now, partner in (({"a": 1.0, "b": 2.0}, "low"), ({"a": 2.0, "b": 1.0}, "high")):
        wanted = never_seen(losses_now, others, groups, tokens).pairs["a"].wanted
        torch.testing.assert_close(wanted.losses, token_spread(tokens[partner]).losses)


def test_an_aim_follows_what_was_reached_and_stays_near_what_is_wanted() -> None:
    never, forget = row_tokens(200, 0), row_tokens(200, 1, scale=0.5)
    wanted = token_spread(never)
    mean = float(never.losses.mean())
    rows = NeverSeen({"m": mean}, {"m": mean}, {"m": Pair(wanted, token_spread(forget))})
    aims = Aims(9.0)
    now, surprise = torch.tensor([0.3, 0.1, 0.2]), torch.tensor([-1.0, 0.0, 1.0])
    aims.calibrate(rows)
    answers = torch.tensor([False, True, True])
    first = aims.of_row("m", now, surprise, answers)
    assert first.losses.argsort().tolist() == now.argsort().tolist()  # tokens keep their order
    assert first.surprise.argsort().tolist() == [0, 1, 2]  # each order its own
    torch.testing.assert_close(first.losses[now.argsort()], at_ranks(wanted.losses, 3))
    near = Pair(wanted, TokenSpread(wanted.losses * 0.9, wanted.surprise - 0.1))
    aims.calibrate(NeverSeen({"m": mean}, {"m": mean}, {"m": near}))  # what is missed is added
    torch.testing.assert_close(aims.tensors["aims.losses"][0], wanted.losses * 1.1)
    torch.testing.assert_close(aims.tensors["aims.surprise"][0], wanted.surprise + 0.1)
    for _ in range(20):
        aims.calibrate(rows)  # never reached: only the bound ends it
    [moved] = aims.tensors["aims.losses"]
    assert float((moved - wanted.losses).abs().max()) <= 1.5 + 1e-5
    assert not torch.allclose(moved, wanted.losses)
    [moved] = aims.tensors["aims.surprise"]
    assert float((moved - wanted.surprise).abs().max()) <= 0.5 + 1e-5
    assert not torch.allclose(moved, wanted.surprise)
    unknown = aims.of_row("other", now, surprise, answers)
    # A prompt goes as far as any text, an answer a third further.
    assert unknown.losses.tolist() == pytest.approx([mean, 1.35 * mean, 1.35 * mean])
    assert unknown.surprise.isnan().all()
