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
from expunge.methods.adaptive_rmu import AdaptiveRMU
from expunge.methods.aims import Aims
from expunge.methods.base import Context
from expunge.methods.calibration import (
    EVERY,
    POINTS,
    NeverSeen,
    RowTokens,
    at_ranks,
    matched_by_rank,
    never_seen,
    token_spread,
)
from expunge.methods.libu import LIBU
from expunge.methods.losses import adaptive_target
from expunge.methods.membership import membership_auc

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
    assert matched_by_rank(values, [10.0, 20.0, 30.0]) == pytest.approx(
        [26.667, 13.333, 20.0], abs=1e-3
    )
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
    torch.testing.assert_close(
        rows[2], full.split(forget.lengths)[2]
    )  # a row that nothing is known of
    for _ in range(5):
        objective.calibrate(far(context, 12.0))
    assert set(objective.calibration.values()) == {0.0}  # back to where it was, no further


def test_a_ceiling_follows_the_never_seen_loss_and_stays_near_it(make_context: Contexts) -> None:
    context = make_context()
    objective = LIBU(calibration_gain=0.5, ceiling=9.0).start(context)

    def ceilings() -> set[float]:
        return set(objective.calibration["ceilings"].values())

    objective.calibrate(far(context, 0.0))
    assert ceilings() == {4.0}
    objective.calibrate(far(context, 5.0))
    assert ceilings() == {3.5}
    for _ in range(9):
        objective.calibrate(far(context, 0.0))
    assert ceilings() == {5.0}


def test_without_a_gain_nothing_moves(make_context: Contexts) -> None:
    context = make_context()
    steered = AdaptiveRMU(layer=2, calibration_gain=0).start(context)
    steered.calibrate(far(context, 9.0))
    assert set(steered.calibration.values()) == {1.0}
    pushed = LIBU(calibration_gain=0).start(make_context())
    pushed.calibrate(far(context, 9.0))
    assert pushed.calibration["ceilings"] == {}


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


def test_the_spread_of_one_document_is_its_quantile_function() -> None:
    never, forget = row_tokens(300, 0), row_tokens(40, 1, scale=0.1)
    spread = token_spread([never], [forget])
    ranks = (numpy.arange(POINTS) + 0.5) / POINTS
    for found, values in (
        (spread.wanted, never.losses),
        (spread.reached, forget.losses),
        (spread.wanted_surprise, never.surprise),
        (spread.reached_surprise, forget.surprise),
    ):
        expected = numpy.quantile(values.numpy(), ranks, method="hazen")
        torch.testing.assert_close(found.double(), torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_the_spread_of_several_documents_is_their_barycentre() -> None:
    """Mean of the quantile functions: a document of small losses stays a fourth of the others' tail."""
    rows = [row_tokens(50, seed, scale=1 + seed) for seed in range(4)]
    alone = [token_spread([row], [row]) for row in rows]
    spread = token_spread(rows, rows)
    torch.testing.assert_close(spread.wanted, torch.stack([one.wanted for one in alone]).mean(0))
    torch.testing.assert_close(
        spread.wanted_surprise, torch.stack([one.wanted_surprise for one in alone]).mean(0)
    )


def test_tokens_are_compared_inside_the_groups_that_rows_are() -> None:
    members = {"m1": 1.0, "m2": 1.0}
    nonmembers = {f"n{index}": 2.0 for index in range(10)}
    groups = {**dict.fromkeys(nonmembers, "story"), "n0": "letter", "m1": "story", "m2": "letter"}
    tokens = {row: row_tokens(20, seed) for seed, row in enumerate([*members, *nonmembers])}
    compared = never_seen(members, nonmembers, groups, tokens)
    assert compared.groups == {"m1": "story", "m2": EVERY}
    stories = [tokens[row] for row in nonmembers if row != "n0"]
    expected = token_spread(stories, [tokens["m1"]])
    torch.testing.assert_close(compared.spreads["story"].wanted, expected.wanted)
    everything = token_spread([tokens[row] for row in nonmembers], [tokens["m2"]])
    torch.testing.assert_close(compared.spreads[EVERY].wanted, everything.wanted)
    assert never_seen(members, nonmembers, groups).spreads == {}


def test_an_aim_follows_what_was_reached_and_stays_near_what_is_wanted() -> None:
    never, forget = row_tokens(200, 0), row_tokens(200, 1, scale=0.5)
    spread = token_spread([never], [forget])
    mean = float(never.losses.mean())
    rows = NeverSeen({"m": mean}, {"m": mean}, {"m": "t"}, {"t": spread})
    aims = Aims(9.0, 1.0, match_tokens=True)
    now, surprise = torch.tensor([0.3, 0.1, 0.2]), torch.tensor([-1.0, 0.0, 1.0])
    aims.calibrate(rows)
    first = aims.of_row("m", now, surprise)
    assert first.losses.argsort().tolist() == now.argsort().tolist()  # tokens keep their order
    assert first.surprise.argsort().tolist() == [0, 1, 2]  # each order its own
    assert float(first.losses.mean()) == pytest.approx(mean, rel=1e-5)
    for _ in range(20):
        aims.calibrate(rows)  # never reached: only the bound ends it
    moved = torch.tensor(aims.state()["losses"]["t"])
    assert bool((moved <= spread.wanted * 1.25 + 1e-5).all())
    assert bool((moved >= spread.wanted * 0.5 - 1e-5).all())
    assert not torch.allclose(moved, spread.wanted)
    moved = torch.tensor(aims.state()["surprise"]["t"])
    assert float((moved - spread.wanted_surprise).abs().max()) <= 0.5 + 1e-5
    assert not torch.allclose(moved, spread.wanted_surprise)
    unknown = aims.of_row("other", now, surprise)
    assert unknown.losses.tolist() == [9.0] * 3
    assert unknown.surprise.isnan().all()
