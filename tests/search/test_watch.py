"""When a run is ended early."""

from __future__ import annotations

from typing import Any

import pytest

from expunge.search.trial import Hopeless, Watch


def line(step: int, score: float = 0.5, destroyed: bool = False) -> dict[str, Any]:
    return {"step": step, "validation": {}, "score": score, "destroyed": destroyed}


def test_three_destroyed_validations_and_none_usable_before_end_it() -> None:
    watch = Watch(100, prune=True)
    watch(line(10, destroyed=True))
    watch(line(20, destroyed=True))
    with pytest.raises(Hopeless, match="first 3 validations"):
        watch(line(30, destroyed=True))


def test_a_usable_candidate_saves_it() -> None:
    watch = Watch(100, prune=True)
    watch(line(10))
    for step in range(20, 100, 10):
        watch(line(step, destroyed=True))


def test_without_pruning_nothing_ends_it_and_nothing_is_reported() -> None:
    watch = Watch(100, prune=False, report=lambda _t, _b: pytest.fail("reported"))
    for step in range(10, 100, 10):
        watch(line(step, destroyed=True))


def test_the_best_usable_score_is_reported_once_a_tenth_and_not_at_the_end() -> None:
    told: list[tuple[int, float]] = []

    def report(tenth: int, best: float) -> bool:
        told.append((tenth, best))
        return False

    watch = Watch(50, prune=True, report=report)
    for step, score, destroyed in (
        (2, 0.9, True),
        (5, 0.2, False),
        (7, 0.4, False),
        (10, 0.3, False),
        (12, 0.9, True),
        (15, 0.3, False),
        (49, 0.6, False),
        (50, 0.7, False),
    ):
        watch(line(step, score, destroyed))
    assert told == [(1, 0.2), (2, 0.4), (3, 0.4), (9, 0.6)]


def test_it_ends_where_the_report_says_so_or_somebody_asks() -> None:
    with pytest.raises(Hopeless, match="after 20% of the run"):
        Watch(10, prune=True, report=lambda _t, _b: True)(line(2))
    with pytest.raises(KeyboardInterrupt):
        Watch(10, prune=False, asked_to_stop=lambda: True)({"step": 1, "loss": 0.3})
