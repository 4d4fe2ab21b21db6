"""Too little and too much are both named, and the rule says which comes first."""

from __future__ import annotations

import math

import pytest

from expunge.evaluation.outcomes import Measured, of_run
from expunge.evaluation.sentences import run_sentence

TARGET = Measured(1.0, 0.05, 1.0, 0.05, 1.0)
GUESSING = math.log(2048)


def kept(forget: float, auc: float | None, retain: float = 0.95, loss: float = 4.0) -> Measured:
    return Measured(forget, loss, retain, 0.2, auc)


@pytest.mark.parametrize(
    ("measured", "ending"),
    [
        (TARGET, "unchanged"),
        (kept(0.95, 0.99, loss=0.1), "unchanged"),
        (kept(0.05, 0.9), "under-unlearned"),
        (kept(0.5, 0.5), "under-unlearned"),
        (kept(0.5, None), "under-unlearned"),
        (kept(0.02, 0.5), "unlearned"),
        (kept(0.02, None), "unlearned"),
        (kept(0.0, 0.7), "unlearned"),
        (kept(0.0, 0.1), "over-unlearned"),
        (kept(0.0, None, loss=9.0), "over-unlearned"),
        (kept(0.0, 0.0, retain=0.1), "destroyed"),
        (kept(0.0, 0.5, retain=math.nan, loss=math.nan), "destroyed"),
    ],
)
def test_every_ending(measured: Measured, ending: str) -> None:
    finding = of_run(measured, TARGET, GUESSING)
    assert finding.outcome == ending
    assert run_sentence(finding)


def test_what_chance_gives_to_few_documents_is_no_ending() -> None:
    for auc, wrong in ((0.03, "over-unlearned"), (0.97, "under-unlearned")):
        # One document of 45 texts is inside the middle 95%, five are not.
        assert of_run(kept(0.0, auc), TARGET, GUESSING, (1, 45)).outcome == "unlearned"
        assert of_run(kept(0.0, auc), TARGET, GUESSING, (5, 45)).outcome == wrong
    assert of_run(kept(0.0, 0.0), TARGET, GUESSING, (1, 45)).outcome == "over-unlearned"
    assert of_run(kept(0.5, 0.1), TARGET, GUESSING, (1, 9)).outcome == "under-unlearned"


def test_the_mend_points_the_other_way() -> None:
    assert "raise" in run_sentence(of_run(kept(0.05, 0.9), TARGET, GUESSING))
    assert "lower" in run_sentence(of_run(kept(0.0, 0.1), TARGET, GUESSING))
