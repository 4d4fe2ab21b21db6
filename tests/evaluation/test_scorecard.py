"""The scorecard of a model that learned its rows by heart, and what stays open when not measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean, harmonic_mean
from typing import Any

import pytest

from conftest import refusal
from expunge.data.rows import RowSet, as_rows
from expunge.data.tokenization import TextPolicy
from expunge.evaluation import generation
from expunge.evaluation.generation import Written
from expunge.evaluation.multiple_choice import Question, read_questions
from expunge.evaluation.outcomes import of_scores
from expunge.evaluation.scorecard import Material, Scorecard, evaluate_model
from expunge.evaluation.sentences import scores_sentence
from expunge.models.loading import check_model, load_model

POLICY = TextPolicy(128)
Measure = Callable[..., Scorecard]


@pytest.fixture(autouse=True)
def _few_new_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    # The answers have fewer; rows of several lengths then share a batch in a context of 128.
    monkeypatch.setattr(generation, "MAX_NEW_TOKENS", 40)


@pytest.fixture(scope="module")
def model(memorised_dir: Path) -> Any:
    return load_model(check_model(str(memorised_dir)), "float32", "cpu")


@pytest.fixture
def measure(
    model: Any,
    tokenizer: Any,
    forget_rows: list[dict[str, str]],
    retain_rows: list[dict[str, str]],
    nonmember_rows: list[dict[str, str]],
    quiz_dir: Path,
) -> Measure:
    """Everything is measured unless an argument leaves it out or replaces it."""

    def call(**changed: Any) -> Scorecard:
        questions, examples = read_questions(quiz_dir)
        material: dict[str, Any] = {
            "forget": as_rows(forget_rows, "forget"),
            "retain": as_rows(retain_rows, "retain"),
            "nonmembers": as_rows(nonmember_rows, "nonmembers"),
            "questions": questions,
            "examples": examples,
        }
        how: dict[str, Any] = {"policy": POLICY}
        how |= {
            name: changed.pop(name) for name in ("policy", "batch_size", "progress") if name in changed
        }
        return evaluate_model(model, tokenizer, Material(**(material | changed)), **how)

    return call


def test_a_model_that_knows_its_rows_scores_so(measure: Measure) -> None:
    card = measure()
    known = {"regurgitation": 1.0, "knowledge": 1.0}
    assert card.forget == card.retain == {"Task1": known, "Task2": known}
    assert card.task_aggregate == 0  # nothing is forgotten
    assert card.mia_auc == 1
    assert card.mia_score == 0
    assert card.utility is not None
    assert card.final_score == pytest.approx(card.utility / 3)
    assert card.details["rows"] == {"forget": 8, "retain": 8}
    # Members are the continuation rows, as non-members are.
    assert (card.details["mia"]["members"], card.details["mia"]["nonmembers"]) == (4, 3)
    assert card.details["utility"]["by_subject"] == {"counting": card.utility}
    assert card.details["dtype"] == "float32"


def test_a_right_answer_without_an_end_is_a_finding(
    measure: Measure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "expunge.evaluation.passes.generate",
        lambda _model, _tokenizer, prompts, *_: [
            Written(f" {text}", ended)
            for text, ended in (
                ("Paris and Rome and Paris", False),
                ("Paris and Rome", True),
                ("Parisian", False),
                ("Paris.", False),
            )
        ],
    )
    rows = [{"id": f"a{n}qa0", "input": "Where?", "output": "Paris"} for n in range(4)]
    card = measure(forget=as_rows(rows, "forget"), retain=None, nonmembers=None, questions=None)
    assert card.forget == {"default": {"regurgitation": None, "knowledge": 0.0}}
    assert [record["runs_on"] for record in card.records] == [True, False, False, True]
    found = of_scores(Scorecard.from_json(json.loads(json.dumps(card.to_json()))))
    assert scores_sentence(found[0]).startswith(
        "never stops: 2 of 4 forget questions got the right answer"
    )
    monkeypatch.undo()
    assert not any(each.name == "never stops" for each in of_scores(measure()))


def partly_known(rows: list[dict[str, str]]) -> RowSet:
    """Rows in which every other output is another one, so that the scores lie inside (0, 1)."""
    return as_rows(
        [row | ({"output": "Rome and more."} if n % 4 < 2 else {}) for n, row in enumerate(rows)],
        "forget",
    )


def test_cells_and_aggregate_are_means_of_the_records(
    measure: Measure, forget_rows: list[dict[str, str]], retain_rows: list[dict[str, str]]
) -> None:
    rows = forget_rows + [row | {"id": "x" + row["id"]} for row in forget_rows]
    card = measure(forget=partly_known(rows), retain=as_rows(retain_rows[:3], "retain"))
    expected: dict[tuple[str, str, str], float] = {}
    for record in card.records:
        key = (record["split"], record["task"], record["kind"])
        mine = [r["score"] for r in card.records if (r["split"], r["task"], r["kind"]) == key]
        expected[key] = fmean(mine)
    for (split, task, kind), value in expected.items():
        cells = card.forget if split == "forget" else card.retain
        name = "regurgitation" if kind == "sc" else "knowledge"
        assert cells[task][name] == pytest.approx(value)
    assert card.retain["Task2"]["knowledge"] is None  # the third row is its continuation
    parts = [1 - v if split == "forget" else v for (split, _, _), v in expected.items()]
    assert len(parts) == 7
    assert card.task_aggregate == pytest.approx(harmonic_mean([max(0, part) for part in parts]))
    assert card.mean("retain") == 1
    assert 0 < (card.mean("forget") or 0) < 1


def test_memorisation_is_the_mean_of_the_records(measure: Measure, forget_rows: Any) -> None:
    card = measure(forget=partly_known(forget_rows), retain=None)
    for name in ("extraction_strength", "exact_memorisation"):
        values = [record[name] for record in card.records]
        assert card.memorisation["forget"][name] == pytest.approx(fmean(values))
        assert 0 < fmean(values) < 1
        assert card.memorisation["retain"][name] is None
    known = {"extraction_strength": 1.0, "exact_memorisation": 1.0}
    assert measure().memorisation == {"forget": known, "retain": known}


def test_a_file_from_before_memorisation_is_read(measure: Measure) -> None:
    older = {k: v for k, v in measure().to_json().items() if k != "memorisation"}
    assert Scorecard.from_json(older).memorisation == {}


def comparable(card: Scorecard) -> Mapping[str, Any]:
    values = card.to_json()
    return {name: value for name, value in values.items() if name != "details"}


def test_batch_size_changes_no_score(measure: Measure, forget_rows: list[dict[str, str]]) -> None:
    rows = partly_known(forget_rows)
    alone, together = (measure(forget=rows, batch_size=size) for size in (1, 64))
    assert comparable(alone) == comparable(together)
    assert alone.records == together.records
    for name, value in alone.details["mia"].items():
        # A padded batch sums in another order.
        assert together.details["mia"][name] == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize(
    ("missing", "open_parts"),
    [
        ("retain", {"task_aggregate"}),
        ("nonmembers", {"mia_auc", "mia_score"}),
        ("questions", {"utility"}),
    ],
)
def test_what_is_not_measured_stays_open(missing: str, open_parts: set[str], measure: Measure) -> None:
    card = measure(**{missing: None})
    values = comparable(card)
    assert {name for name, value in values.items() if value is None} == open_parts | {"final_score"}
    if missing == "retain":
        assert card.retain == {}
        assert card.mean("retain") is None


def test_forget_rows_alone_give_their_cells_and_no_score(measure: Measure) -> None:
    card = measure(retain=None, nonmembers=None, questions=None, examples=None)
    totals = {name: value for name, value in comparable(card).items() if value is None}
    assert set(totals) == {"task_aggregate", "mia_auc", "mia_score", "utility", "final_score"}
    assert "mia" not in card.details
    assert "utility" not in card.details


def test_a_set_without_continuations_uses_all_its_rows_as_members(
    measure: Measure, forget_rows: list[dict[str, str]]
) -> None:
    questions = as_rows([row for row in forget_rows if "qa" in row["id"]], "forget")
    assert measure(forget=questions).details["mia"]["members"] == 4


def test_a_scorecard_survives_json(measure: Measure) -> None:
    for card in (measure(), measure(retain=None, nonmembers=None, questions=None)):
        again = Scorecard.from_json(json.loads(json.dumps(card.to_json())))
        assert again.to_json() == card.to_json()
        assert not again.records  # they are a file of their own
    with pytest.raises(KeyError):
        Scorecard.from_json({"forget": {}, "retain": {}})


def test_json_holds_no_text(measure: Measure, forget_rows: list[dict[str, str]]) -> None:
    written = json.dumps(measure().to_json())
    for row in forget_rows:
        assert row["input"] not in written
        assert row["output"] not in written


def test_progress_reaches_the_end_of_every_phase(measure: Measure) -> None:
    last: dict[str, tuple[int, int]] = {}

    def progress(name: str, done: int, total: int) -> None:
        last[name] = (done, total)

    measure(progress=progress, batch_size=3)
    assert last == {
        "generate forget": (8, 8),
        "generate retain": (8, 8),
        "loss of members": (4, 4),
        "loss of non-members": (3, 3),
        "utility": (2, 2),
    }


LONG = [{"id": "fits", "input": "a", "output": "b"}, {"id": "long", "input": "a " * 130}]


def test_material_that_does_not_fit_is_found_without_weights(tokenizer: Any) -> None:
    fits = as_rows(LONG[:1], "forget")
    too_long = as_rows([*LONG[:1], LONG[1] | {"output": "b"}], "forget")
    long_output = as_rows([{"id": "wide", "input": "a", "output": "b " * 130}], "forget")
    question = Question("s", "long " * 200, ("a", "b", "c", "d"), 0)

    def check(
        forget: RowSet, retain: Any, nonmembers: Any, questions: Any, examples: Any
    ) -> Callable[[], None]:
        material = Material(forget, retain, nonmembers, None, questions, examples)
        return lambda: material.check(tokenizer, POLICY)

    other = as_rows([{"id": "other", "input": "c", "output": "d"}], "retain")
    check(fits, other, other, [], {})()
    # Its end could never be generated: a cut that nobody would see.
    message = refusal(check(long_output, None, None, None, None))
    assert message.startswith("row 'wide': has ")
    for forget, retain in ((too_long, None), (other, too_long)):
        message = refusal(check(forget, retain, None, None, None))
        assert message.startswith("row 'long': its prompt has 131 tokens")
        assert "fills the context of 128; shorten it" in message
    message = refusal(check(fits, None, long_output, None, None))
    assert message.startswith("row 'wide': has ")
    assert "question 1" in refusal(check(fits, None, None, [question], None))
