"""The Pareto front and the choice from it."""

from __future__ import annotations

import random

from expunge.search.results import chosen, dominates, pareto_front


def test_the_front_is_what_no_other_beats() -> None:
    values = {0: (0.9, 0.1), 1: (0.5, 0.5), 2: (0.4, 0.4), 3: (0.1, 0.9), 4: (0.5, 0.5)}
    assert pareto_front(values) == [0, 1, 3, 4]
    assert pareto_front({}) == []
    assert pareto_front({7: (0.0,), 8: (0.3,), 9: (0.3,)}) == [8, 9]


def test_the_front_of_random_points_by_its_definition() -> None:
    draw = random.Random(0)
    for size in (1, 5, 40):
        points = {i: [round(draw.random(), 1) for _ in range(3)] for i in range(size)}
        front = set(pareto_front(points))
        assert front
        for key, mine in points.items():
            beaten = [
                other
                for other in points.values()
                if all(a >= b for a, b in zip(other, mine, strict=True)) and other != mine
            ]
            assert (key in front) == (not beaten)


def test_nothing_dominates_itself() -> None:
    assert not dominates((0.5, 0.5), (0.5, 0.5))
    assert dominates((0.5, 0.6), (0.5, 0.5))
    assert not dominates((0.5, 0.6), (0.6, 0.5))


def test_the_chosen_one_has_no_weak_side_and_is_the_first_of_equals() -> None:
    assert chosen({3: (1.0, 0.0), 4: (0.5, 0.5), 5: (0.5, 0.5)}) == 4
    assert chosen({1: (0.2,), 2: (0.7,)}) == 2
    assert chosen({}) is None
