"""The checks of a row: what is accepted, what it becomes, and how a fault is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import refusal
from expunge.data.rows import Row, as_rows, check_disjoint, read_rows

CANARY = "canary-4711"


def row(**columns: object) -> dict[str, object]:
    return {"input": "Ada lives in", "output": "Paris.", **columns}


def only(values: dict[str, object]) -> Row:
    (read,) = as_rows([values], "forget")
    return read


def test_columns_that_are_missing_are_filled_in() -> None:
    first, second = as_rows([row(), row(id="", task=None)], "forget")
    assert (first.id, first.task, first.kind) == ("forget-1", "default", "sc")
    assert (second.id, second.task) == ("forget-2", "default")
    assert first.text == "Ada lives in Paris."


@pytest.mark.parametrize(("given_id", "kept"), [(7, "7"), ('"8f"sc1', '"8f"sc1'), ("ä b", "ä b")])
def test_ids_are_kept_as_they_are(given_id: object, kept: str) -> None:
    assert only(row(id=given_id)).id == kept


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        ({"kind": "qa", "id": "xsc1"}, "qa"),
        ({"kind": "sc", "input": "Who?"}, "sc"),
        ({"id": "xsc1", "input": "Who?"}, "sc"),
        ({"id": "xqa3"}, "qa"),
        ({"id": "xqa10"}, "qa"),
        ({"id": "xsc12", "input": "Who?"}, "sc"),
        ({"id": "qa1"}, "qa"),
        ({"id": "xqa"}, "sc"),
        ({"input": "Who? "}, "qa"),
        ({"input": "Who? she asked"}, "sc"),
        ({"kind": None, "id": "qa"}, "sc"),
    ],
)
def test_kind_is_given_else_read_from_the_id_else_from_the_question_mark(
    columns: dict[str, object], kind: str
) -> None:
    assert only(row(**columns)).kind == kind


@given(st.text(alphabet="ab \n", min_size=3, max_size=30))
def test_a_text_is_split_at_the_space_nearest_its_middle(text: str) -> None:
    whole = text.strip()
    cuts = [i for i in range(1, len(whole)) if whole[i] == " " and not whole[i - 1].isspace()]
    cuts = [i for i in cuts if not whole[i + 1].isspace()]
    if not cuts:
        if whole:
            assert "single word" in refusal(lambda: only({"text": text}))
        return
    read = only({"text": text})
    assert read.text == whole
    distance = min(abs(cut - len(whole) / 2) for cut in cuts)
    assert abs(len(read.input) - len(whole) / 2) == distance


FAULTS: list[tuple[dict[str, object], tuple[str, ...]]] = [
    ({"input": CANARY}, ("no column 'output'", "'input'", "rows need")),
    ({"prompt": CANARY, "answer": CANARY}, ("no column 'input'", "'prompt', 'answer'")),
    ({}, ("no column 'input'", "found: none")),
    ({CANARY: "x", "answer": CANARY}, ("no column 'input'", "found: 'answer', 1 others")),
    ({"input": CANARY, "output": None}, ("column 'output' holds a null", "use text")),
    ({"input": [CANARY], "output": "x"}, ("column 'input' holds a list", "use text")),
    ({"input": CANARY, "output": 4}, ("column 'output' holds a int", "use text")),
    ({"input": "\n ", "output": CANARY}, ("column 'input' is empty", "drop the row")),
    ({"text": 4}, ("column 'text' holds a int",)),
    ({"text": CANARY}, ("column 'text' is a single word",)),
    (row(id=1.5, output=CANARY), ("column 'id' holds a float", "whole number")),
    (row(id=True, output=CANARY), ("column 'id' holds a bool",)),
    (row(task=3, output=CANARY), ("column 'task' holds a int", "use text")),
    (row(id="a\ud800", output=CANARY), ("column 'id' holds half a character",)),
    (row(task="\ud800", output=CANARY), ("column 'task' holds half a character",)),
    (row(kind=CANARY), ("column 'kind' is not one of sc, qa",)),
]


@pytest.mark.parametrize(("values", "words"), FAULTS)
def test_a_fault_names_line_and_column_and_shows_no_text(
    values: dict[str, object], words: tuple[str, ...], tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row(output=CANARY)) + "\n\n" + json.dumps(values) + "\n")
    message = refusal(lambda: read_rows(str(path), "forget"))
    assert message.startswith(f"{path} line 3: ")
    for word in words:
        assert word in message
    assert CANARY not in message
    assert message.removeprefix(f"{path} line 3: ") in refusal(lambda: only(values))


def test_the_first_fault_is_named_and_the_others_counted() -> None:
    rows = [row(), row(output=""), row(output=3), row(task=4)]
    message = refusal(lambda: as_rows(rows, "retain"))
    assert message.startswith("retain rows row 2: column 'output' is empty")
    assert message.endswith("(and 2 more faulty rows)")


def test_an_id_used_twice_names_both_places() -> None:
    rows = [row(id="a"), row(id=1), row(id="1")]
    message = refusal(lambda: as_rows(rows, "forget"))
    assert "row 3: id '1' was used before, at row 2; give every row an id of its own" in message


def test_no_rows_at_all() -> None:
    assert refusal(lambda: as_rows([], "retain")) == "retain rows: holds no rows; give at least one"


def test_rows_on_both_sides_are_listed_by_id() -> None:
    forget = as_rows([row(id=f"f{n}", output=f"{CANARY} {n}") for n in range(14)], "forget")
    same_text = as_rows([row(id="r", output=f"  {CANARY}\n3")], "retain")
    message = refusal(lambda: check_disjoint(forget, same_text))
    assert "1 rows are in retain rows as well (ids f3); remove them from one side" in message
    assert "(ids r)" in refusal(lambda: check_disjoint(same_text, forget))
    same_id = as_rows([row(id="f2", output="other"), row(id="x", output="another")], "retain")
    assert "(ids f2)" in refusal(lambda: check_disjoint(forget, same_id))
    many = as_rows([*forget, row(id="more", output="x")], "retain")
    message = refusal(lambda: check_disjoint(forget, many))
    assert message.count("f1") == 1  # f10 to f13 are counted, not listed
    assert "f9 and 4 more" in message
    assert CANARY not in message
    check_disjoint(forget, as_rows([row(id="y", output="else")], "retain"))


def test_the_same_file_on_both_sides_is_said_so() -> None:
    rows = as_rows([row(id="a"), row(id="b", output="x")], "forget")
    message = refusal(lambda: check_disjoint(rows, rows))
    assert message == "forget rows and forget rows: hold the same rows; give two different sets"


def test_a_repr_names_ids_and_shows_no_text() -> None:
    rows = as_rows([row(id="a", input=CANARY, output=CANARY)], "forget")
    shown = f"{rows!r} {rows.rows!r} {rows}"
    assert "id='a'" in shown
    assert CANARY not in shown


def test_rows_in_memory_are_checked_once_and_fingerprinted() -> None:
    rows = as_rows([Row("a", "x", "y"), row(id="b")], "forget")
    assert as_rows(rows, "forget") is rows
    assert list(rows.sha256) == ["forget rows"]
    other = as_rows([Row("a", "x", "z"), row(id="b")], "forget")
    assert rows.sha256 != other.sha256
    # Fields are fenced off from each other: moving a letter over a border is another row.
    moved = as_rows([Row("a", "xy", "z"), row(id="b")], "forget")
    assert as_rows([Row("ax", "y", "z"), row(id="b")], "forget").sha256 != moved.sha256
