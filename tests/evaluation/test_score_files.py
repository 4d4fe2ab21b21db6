"""A scores.json that is read is checked to its last cell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import refusal
from expunge.evaluation.score_files import read_scores, scores_text
from expunge.evaluation.scorecard import Scorecard

CARD = Scorecard(
    forget={"Task1": {"regurgitation": 0.25, "knowledge": None}},
    retain={"Task1": {"regurgitation": 1.0, "knowledge": 0.0}},
    task_aggregate=0.5,
    mia_auc=0.5,
    mia_score=1.0,
    utility=None,
    final_score=None,
    details={"rows": {"forget": 3, "retain": 2}},
)


def test_what_was_written_is_read_from_the_file_and_from_its_directory(tmp_path: Path) -> None:
    text = scores_text(CARD, "model", {"a.safetensors": "0" * 64})
    (tmp_path / "scores.json").write_text(text)
    for source in (tmp_path, tmp_path / "scores.json"):
        assert read_scores(str(source)) == CARD


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("utility", "0.5", "utility holds text; a score is a number from 0 to 1, or null"),
        ("final_score", True, "final_score holds true or false"),
        ("mia_auc", [0.5], "mia_auc holds a list"),
        ("mia_auc", 1.5, "mia_auc holds 1.5"),
        ("mia_score", float("nan"), "mia_score holds nan"),
        ("utility", {}, "utility holds names"),
        ("utility", 10**400, "utility holds a whole number"),
        ("forget", [1], "forget holds a list where names with values belong"),
        ("retain", None, "retain holds null"),
        ("retain", {"Task2": 0.5}, "retain Task2 holds 0.5 where names"),
        ("retain", {"Task2": {"knowledge": "x"}}, "retain Task2 knowledge holds text"),
        ("details", [], "details holds a list"),
    ],
)
def test_a_cell_that_holds_no_score_is_named_with_its_file(
    place: str, value: Any, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({**CARD.to_json(), place: value}))
    message = refusal(lambda: read_scores(str(path)))
    assert message.startswith(f"{path}: {said}")
    assert message.endswith("make it anew with expunge evaluate")


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", "{", '{"forget": {}, "retain": {}}'])
def test_what_is_no_scores_file_is_said_to_be_none(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text)
    assert f"{path}: is not a scores.json" in refusal(lambda: read_scores(str(path)))
