"""The course of the learning rate."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from expunge.methods.base import Schedule
from expunge.training.options import schedule_factor


def test_a_trapezoid_is_constant_and_then_falls_in_a_line() -> None:
    course = [schedule_factor("trapezoid", step / 100) for step in range(100)]
    assert course[:61] == [1.0] * 61
    assert course[80] == pytest.approx(0.5)
    falls = [a - b for a, b in pairwise(course[60:])]
    assert falls == pytest.approx([1 / 40] * 39)


def test_a_cosine_falls_as_one() -> None:
    for done in (0.0, 0.25, 0.5, 1.0):
        expected = math.cos(math.pi * done / 2) ** 2
        assert schedule_factor("cosine", done) == pytest.approx(expected)


@pytest.mark.parametrize(("schedule", "mean"), [("constant", 1.0), ("cosine", 0.5), ("trapezoid", 0.8)])
def test_how_far_the_steps_go_together(schedule: Schedule, mean: float) -> None:
    steps = 10_000
    total = sum(schedule_factor(schedule, step / steps) for step in range(steps))
    assert total / steps == pytest.approx(mean, abs=1e-3)
