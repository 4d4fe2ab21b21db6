"""What scores mean in words: unchanged, destroyed, over-unlearned, and when nothing is said."""

from __future__ import annotations

from typing import Any

import pytest

from expunge.evaluation.outcomes import of_scores
from expunge.evaluation.scorecard import Scorecard
from expunge.evaluation.sentences import scores_sentence


def card(forget: float | None, retain: float | None, **totals: Any) -> Scorecard:
    names = ("task_aggregate", "mia_auc", "mia_score", "utility", "final_score")
    empty: dict[str, Any] = dict.fromkeys(names)
    return Scorecard(
        forget={} if forget is None else {"T": {"regurgitation": forget, "knowledge": None}},
        retain={} if retain is None else {"T": {"regurgitation": retain, "knowledge": retain}},
        **(empty | totals),
    )


TARGET = card(0.9, 0.8, utility=0.65)


def kinds(*cards: Any) -> list[str]:
    return [finding.name for finding in of_scores(*cards)]


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (card(0.1, 0.7, mia_auc=0.5, utility=0.6), []),
        (card(0.82, 0.8), ["unchanged"]),  # above 90% of the target's 0.9
        (card(0.80, 0.8), []),
        (card(0.0, 0.39), ["destroyed"]),  # below half of the target's 0.8
        (card(0.0, 0.41), []),
        (card(0.0, 0.8, utility=0.44), ["destroyed"]),  # half of what is above guessing is 0.45
        (card(0.0, 0.8, utility=0.46), []),
        (card(0.0, 0.8, mia_auc=0.29), ["over-unlearned"]),
        (card(0.0, 0.8, mia_auc=0.71), ["not forgotten by loss"]),
        (card(0.0, 0.8, mia_auc=0.31), []),
        (card(0.9, 0.1, mia_auc=0.0, utility=0.25), ["destroyed"] * 2 + ["unchanged", "over-unlearned"]),
    ],
)  # fmt: skip
def test_findings_beside_the_target(measured: Scorecard, expected: list[str]) -> None:
    assert kinds(measured, TARGET) == expected


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (card(0.81, 0.8), ["unchanged"]),
        (card(0.79, 0.8), []),
        (card(0.0, 0.19), ["destroyed"]),
        (card(0.0, 0.21, utility=0.1), []),
        (card(0.0, None, mia_auc=0.1), ["over-unlearned"]),
        (card(None, None), []),
    ],
)
def test_findings_of_one_card_alone_use_fixed_bounds(measured: Scorecard, expected: list[str]) -> None:
    assert kinds(measured) == expected


def test_a_target_that_does_not_know_the_rows_has_nothing_to_forget() -> None:
    assert kinds(card(0.0, 0.8), card(0.0, 0.8)) == ["nothing to forget"]
    assert kinds(card(0.0, 0.8), card(0.11, 0.8)) == []


def test_a_finding_gives_both_numbers() -> None:
    (finding,) = of_scores(card(0.88, 0.8), TARGET)
    assert "still scores 0.88, the target 0.90" in scores_sentence(finding)
    (finding,) = of_scores(card(0.0, 0.1), TARGET)
    assert "0.10 is left on the retain set, the target has 0.80" in scores_sentence(finding)


def test_a_target_that_only_guesses_says_nothing_about_utility() -> None:
    guessing = card(0.9, 0.8, utility=0.25)
    assert kinds(card(0.0, 0.8, utility=0.1), guessing) == []


def test_a_target_whose_part_is_open_is_replaced_by_the_fixed_bound() -> None:
    assert kinds(card(0.85, 0.1), card(None, None)) == ["destroyed", "unchanged"]


@pytest.mark.parametrize(("members", "expected"), [(1, []), (9, ["over-unlearned"])])
def test_an_auc_of_few_documents_says_nothing_that_chance_says(
    members: int, expected: list[str]
) -> None:
    few = card(0.0, 0.8, mia_auc=0.1, details={"mia": {"members": members, "nonmembers": 30}})
    assert kinds(few) == expected
