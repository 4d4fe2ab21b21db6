"""Objectives: the scorecard's own parts, all in [0, 1], all better when higher."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest

from conftest import refusal
from expunge.evaluation.scorecard import Scorecard
from expunge.evaluation.scores import task_aggregate
from expunge.search.objectives import NEEDS, check_objectives, objective_value

CARD = Scorecard(
    forget={"A": {"regurgitation": 0.2, "knowledge": 0.5}, "B": {"regurgitation": None}},
    retain={"A": {"regurgitation": 0.9, "knowledge": 0.6}},
    task_aggregate=0.7,
    mia_auc=0.4,
    mia_score=0.8,
    utility=0.3,
    final_score=0.6,
)


def test_values_are_those_of_the_scorecard() -> None:
    assert objective_value("forgetting", CARD) == pytest.approx(2 / (1 / 0.8 + 1 / 0.5))
    assert objective_value("retention", CARD) == pytest.approx(2 / (1 / 0.9 + 1 / 0.6))
    found = [objective_value(name, CARD) for name in ("final", "aggregate", "mia", "utility")]
    assert found == [0.6, 0.7, 0.8, 0.3]


def test_forgetting_and_retention_make_up_the_task_aggregate() -> None:
    draw = random.Random(0)
    for _ in range(20):
        forget = [draw.random() for _ in range(4)]
        retain = [draw.random() for _ in range(4)]
        card = dataclasses.replace(
            CARD,
            forget={str(i): {"knowledge": v} for i, v in enumerate(forget)},
            retain={str(i): {"knowledge": v} for i, v in enumerate(retain)},
        )
        f, r = objective_value("forgetting", card), objective_value("retention", card)
        assert f is not None
        assert r is not None
        assert 2 / (1 / f + 1 / r) == pytest.approx(task_aggregate(forget, retain))


def test_one_part_at_its_worst_makes_the_objective_0() -> None:
    card = dataclasses.replace(CARD, forget={"A": {"knowledge": 1.0, "regurgitation": 0.0}})
    assert objective_value("forgetting", card) == 0.0


@pytest.mark.parametrize("side", ["forget", "retain"])
def test_better_is_higher(side: str) -> None:
    name: Any = "forgetting" if side == "forget" else "retention"
    values = []
    for value in (0.1, 0.4, 0.8):
        cells = {"A": {"knowledge": value, "regurgitation": 0.5}}
        sides: Any = {side: cells}
        values.append(objective_value(name, dataclasses.replace(CARD, **sides)))
    assert values == sorted(values, reverse=side == "forget")  # type: ignore[type-var]
    assert len(set(values)) == 3


def test_what_was_not_measured_is_none() -> None:
    empty = Scorecard({}, {}, None, None, None, None, None)
    assert {objective_value(name, empty) for name in NEEDS} == {None}


def test_what_cannot_be_measured_is_refused_with_what_can() -> None:
    message = refusal(lambda: check_objectives(("final",), {"retain", "nonmembers"}))
    assert "--objectives final: not measured without utility (--mmlu)" in message
    assert message.endswith("aggregate, forgetting, retention, mia")
    assert "MIA score (--calibration)" in refusal(lambda: check_objectives(("mia",), {"retain"}))
    assert "given twice" in refusal(lambda: check_objectives(("mia", "mia"), {"nonmembers"}))
    assert "none given" in refusal(lambda: check_objectives((), set()))
    check_objectives(("final",), {"retain", "nonmembers", "mmlu"})
    check_objectives(("forgetting",), set())
