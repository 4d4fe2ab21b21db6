"""Forget rows beside never-seen ones: matched by rank, inside their task, and only as far as needed."""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Callable

import pytest
import torch

from expunge.data.batches import collate
from expunge.methods.adaptive_rmu import AdaptiveRMU
from expunge.methods.base import Context
from expunge.methods.calibration import NeverSeen, matched_by_rank, never_seen
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
    assert set(objective.strengths.values()) == {1.0}  # not there yet: all the way
    objective.calibrate(far(context, 6.0))
    assert list(objective.strengths.values()) == [
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
    assert set(objective.strengths.values()) == {0.0}  # back to where it was, no further


def test_a_ceiling_follows_the_never_seen_loss_and_stays_near_it(make_context: Contexts) -> None:
    context = make_context()
    objective = LIBU(calibration_gain=0.5, ceiling=9.0).start(context)
    objective.calibrate(far(context, 0.0))
    assert set(objective.strengths.values()) == {4.0}
    objective.calibrate(far(context, 5.0))
    assert set(objective.strengths.values()) == {3.5}
    for _ in range(9):
        objective.calibrate(far(context, 0.0))
    assert set(objective.strengths.values()) == {5.0}


@pytest.mark.parametrize(
    "method", [AdaptiveRMU(layer=2, calibration_gain=0), LIBU(calibration_gain=0)]
)
def test_without_a_gain_nothing_moves(method: AdaptiveRMU | LIBU, make_context: Contexts) -> None:
    context = make_context()
    objective = method.start(context)
    objective.calibrate(far(context, 9.0))
    assert set(objective.strengths.values()) <= {1.0}
