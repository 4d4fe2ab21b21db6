"""The checks of a row: what is accepted, what it becomes, and how a fault is said."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import refusal
from expunge.audits.inputs import AuditInputs
from expunge.cli.erase import EraseInputs
from expunge.data.rows import Reading, Row, as_rows, check_disjoint, document_of, read_rows
from expunge.evaluation.measuring import MeasureInputs
from expunge.ledger.serving import ServeInputs
from expunge.ledger.verifying import VerifyInputs
from expunge.runs.run import RunInputs
from expunge.search.inputs import SweepInputs

CANARY = "canary-4711"


def row(**columns: object) -> dict[str, object]:
    return {"input": "Ada lives in", "output": "Paris.", **columns}


QUESTIONS = (
    *(
        "艾达住在哪里？",
        "أين تعيش آدا؟",
        "Πού ζει η Άντα;",
        "Who?!",
        '"Who?"',
        "(Who? )",
        "«Qui ?»",
    ),
    *("Question: Who?\nAnswer:", "Q: Who? A:", "问题：谁？\n回答：", "प्रश्न: कौन?\nउत्तर:"),
    *(
        "[INST] Who? [/INST]",
        "<|user|>\nWho?</s>\n<|assistant|>\n",
        "### Input:\nWho?\n\n### Response:",
    ),
)


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
        ({"id": "36307590sc1", "input": "Who?"}, "sc"),
        ({"id": "36307590qa10"}, "qa"),
        ({"id": "8f24c511-a319-4a9f-80c2-ca6fac13123fqa1"}, "qa"),
        ({"id": '"8f24c511-a319-4a9f-80c2-ca6fac13123f"sc12', "input": "Who?"}, "sc"),
        ({"id": "1a2b3c4d-12efqa3"}, "qa"),
        ({"id": "qa1"}, "qa"),
        ({"id": "xqa"}, "sc"),
        ({"id": "disc1", "input": "Who?"}, "qa"),
        ({"id": "desc12", "input": "Who?"}, "qa"),
        ({"id": "misc2"}, "sc"),
        ({"input": "Who? "}, "qa"),
        ({"input": "Who? she asked"}, "sc"),
        ({"input": "Who? Ada"}, "sc"),
        ({"input": "HAMLET: Who?\nHORATIO:"}, "sc"),
        *(({"input": question}, "qa") for question in QUESTIONS),
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
    if len(whole.split()) < 2:
        if whole:
            assert "single word" in refusal(lambda: only({"text": text}))
        return
    read = only({"text": text})
    assert (read.text, read.kind) == (whole, "sc")
    if not cuts:  # line breaks and wider gaps then divide the words
        assert len(read.joiner) > 1 or read.joiner == "\n"
        return
    distance = min(abs(cut - len(whole) / 2) for cut in cuts)
    assert abs(len(read.input) - len(whole) / 2) == distance


FAULTS: list[tuple[dict[str, object], tuple[str, ...]]] = [
    ({"input": CANARY}, ("no column 'output'", "'input'", "rows need")),
    ({"prompt": CANARY, "answer": CANARY}, ("no column 'input'", "'prompt', 'answer'")),
    ({}, ("no column 'input'", "found: none")),
    ({CANARY: "x", "answer": CANARY}, ("no column 'input'", "found: 'answer', 1 others")),
    ({"Ada": "x", "answer": CANARY}, ("no column 'input'", "found: 'answer', 1 others")),
    (row(document=CANARY * 20), ("column 'document' holds a text", "rename")),
    (row(document=1.5, output=CANARY), ("column 'document' holds a float",)),
    ({"messages": CANARY}, ("column 'messages' does not end with a user's",)),
    ({"messages": [CANARY]}, ("column 'messages' holds a turn without",)),
    ({"messages": [{"role": "assistant", "content": CANARY}]}, ("does not end with a user's",)),
    (
        {"messages": [{"role": "user", "content": CANARY}, {"role": "assistant", "content": None}]},
        ("holds a turn without",),
    ),
    ({"instruction": "", "input": "", "output": CANARY}, ("column 'instruction' is empty",)),
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
    (row(kind=CANARY), ("column 'kind' holds another value; write sc or qa",)),
]


ASKED = {"role": "user", "content": "Where?"}
SAID = {"role": "assistant", "content": "In Torun."}
FORMS: list[tuple[dict[str, object], tuple[str, str, str]]] = [
    ({"question": "Name it.", "answer": "In Torun."}, ("Name it.", "In Torun.", "qa")),
    ({"prompt": "Ada lives", "completion": "in Torun."}, ("Ada lives", "in Torun.", "sc")),
    ({"prompt": "Where does", "gt": "Ada live?"}, ("Where does", "Ada live?", "sc")),
    ({"text": "Where?", "labels": "In Torun."}, ("Where?", "In Torun.", "qa")),
    ({"instruction": "Say", "input": "Ada", "output": "Hi"}, ("Say\nAda", "Hi", "qa")),
    ({"instruction": "Say", "input": "", "output": "Hi"}, ("Say", "Hi", "qa")),
    ({"instruction": "Say", "input": None, "output": "Hi"}, ("Say", "Hi", "qa")),
    ({"instruction": "Say", "output": "Hi"}, ("Say", "Hi", "qa")),
    ({"messages": [ASKED, SAID]}, ("Where?", "In Torun.", "qa")),
    (
        {
            "conversations": [
                {"from": "human", "value": "Where?"},
                {"from": "gpt", "value": "Here."},
            ]
        },
        ("Where?", "Here.", "qa"),
    ),
    ({"prompt": [ASKED], "completion": [SAID]}, ("Where?", "In Torun.", "qa")),
    ({"id": 3, "document": "Ada lives here now"}, ("Ada lives", "here now", "sc")),
    ({"text": "Who? Ada, she said"}, ("Who? Ada,", "she said", "sc")),
]


@pytest.mark.parametrize(("values", "parts"), FORMS)
def test_known_forms_are_read_as_they_are(
    values: dict[str, object], parts: tuple[str, str, str]
) -> None:
    read = only(values)
    assert (read.prompt, read.output, read.kind) == parts


def test_of_a_chat_the_last_answer_goes_and_what_was_said_before_stays_in_front() -> None:
    read = only({"messages": [{"role": "system", "content": "Be brief."}, ASKED, SAID, ASKED, SAID]})
    assert (read.input, read.output) == ("Where?", "In Torun.")
    assert [role for role, _ in read.turns] == ["system", "user", "assistant"]
    assert read.text == "Be brief.\nWhere?\nIn Torun.\nWhere? In Torun."
    assert only({"messages": [ASKED, SAID]}).turns == ()
    said = [("system", "Be brief."), ("human", "Hi"), ("gpt", "Hello"), ("human", "Where?")]
    turns = [{"from": who, "value": text} for who, text in [*said, ("gpt", "In Torun.")]]
    read = only({"conversations": turns})
    assert [role for role, _ in read.turns] == ["system", "user", "assistant"]
    assert (read.input, read.output) == ("Where?", "In Torun.")


@pytest.mark.parametrize(
    ("text", "halves"),
    [
        ("艾达住在托伦。她喜欢猫。", ("艾达住在托", "", "伦。她喜欢猫。")),
        ("艾达 住在托伦。她喜欢猫。", ("艾达 住在托", "", "伦。她喜欢猫。")),
        ("アダはトルンに住む", ("アダはト", "", "ルンに住む")),
        ("ที่นี่ที่นี่", ("ที่นี่", "", "ที่นี่")),
        ("Ada\nlives", ("Ada", "\n", "lives")),
    ],
)
def test_a_text_without_blanks_is_split_between_characters(
    text: str, halves: tuple[str, str, str]
) -> None:
    read = only({"text": text})
    assert (read.input, read.joiner, read.output) == halves
    assert read.text == text


@pytest.mark.parametrize(
    "unused",
    [
        {"instruction": "Say it", "question": "Who?"},
        {"notes": "born in Torun"},
        {"answer": "Torun"},
        {"tags": ["a", "born in Torun"]},
        {"meta": {"note": "born in Torun"}},
        {"出生地": "托伦市"},
    ],
)
def test_a_text_that_nothing_reads_is_refused_by_its_column(
    unused: dict[str, object], tmp_path: Path
) -> None:
    values = {"prompt": "Ada lives", "completion": "here", **unused}
    source = write(tmp_path / "rows.jsonl", values)
    name = next(iter(unused))
    for again in (False, True):
        message = refusal(lambda: Reading().read(source, "forget", again=again))  # noqa: B023
        assert (repr(name) if name.isascii() else "1 others") in message
        # What was recorded, or is in memory, has no option to say it with.
        assert ("--columns prompt=prompt,output=completion" in message) != again
        assert message.endswith("take them out") == again
        assert "Torun" not in message
    assert refusal(lambda: only(values)).endswith("take them out")
    only(
        {
            "prompt": "Ada lives",
            "completion": "here",
            "split": "train",
            "n": 3,
            "at": "2026-11-21 9:00",
        }
    )


def write(path: Path, *rows: dict[str, object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_columns_say_what_is_read_and_the_digest_knows(tmp_path: Path) -> None:
    source = write(
        tmp_path / "rows.jsonl",
        {"q": "Say", "who": "Ada", "a": "Hi.", "b": "no such thing", "person": 7, "form": "qa"},
    )
    reading = Reading(
        columns="prompt=q+who,output=a,id=who,document=person,kind=form,retain.output=b",
        joiner="\\n",
    )
    (row,) = reading.read(source, "forget")
    assert (row.id, row.kind, document_of(row)) == ("Ada", "qa", "7")
    assert row.text == "Say\nAda\nHi."
    (kept,) = reading.read(source, "retain")
    assert kept.output == "no such thing"
    (text,) = Reading(columns="prompt=q,output=a,nonmembers.text=b").read(source, "nonmembers")
    assert text.text == "no such thing"
    readings = [
        Reading(columns="prompt=q,output=a"),
        Reading(columns="prompt=q,output=a", joiner=""),
        Reading(columns="prompt=q,output=b"),
        Reading(columns="text=b"),
    ]
    digests = [tuple(each.read(source, "forget").sha256.values()) for each in readings]
    assert len(set(digests)) == len(readings)


def test_words_of_the_joiner_are_of_the_prompt(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", row())
    (read,) = Reading(joiner="\\nAnswer: ").read(source, "forget")
    assert (read.prompt, read.joiner, read.output) == ("Ada lives in\nAnswer:", " ", "Paris.")
    assert read.kind == "sc"


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ("prompt", "is not NAME=COLUMN"),
        ("prompt=", "is not NAME=COLUMN"),
        ("promt=q,output=a", "--columns promt=q"),
        ("kept.prompt=q", "is not NAME=COLUMN"),
        ("prompt=q", "name prompt and output together"),
        ("prompt=q,output=a,text=b", "name prompt and output together"),
        ("prompt=q,input=a,output=a", "stands there twice"),
        ("prompt=q,output=a+b", "has no column 'a+b'"),
        ("text=q,retain.text=a,forget.prompt=q", "name prompt and output together"),
        ("prompt=question,output=a", "has no column 'question'"),
        ("prompt=q,output=a,id=nr", "has no column 'nr'"),
    ],
)
def test_columns_that_cannot_be_meant_are_refused(columns: str, words: str, tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", {"q": "Say", "a": "Hi.", "b": "x y"})
    assert words in refusal(lambda: Reading(columns=columns).read(source, "forget"))


def test_what_was_inferred_is_counted() -> None:
    rows = as_rows([row(), row(input="Who?"), row(id="7qa1"), row(kind="sc", document="d")], "forget")
    assert rows.read == {
        "columns": {"input, output": 4},
        "kind": {"no sign, so sc": 1, "a question mark": 1, "the id": 1, "the column kind": 1},
        "document": {"the row alone": 2, "the id": 1, "the column document": 1},
    }


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
    said = message.removeprefix(f"{path} line 3: ").partition(", or --columns")[0]
    assert said in refusal(lambda: only(values))


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


def test_what_inputs_leave_open_in_those_they_are_made_into_is_known() -> None:
    """A field that gets another name on one side would keep its default in silence."""
    told = {"batch_size", "chat_template", "long_rows", "reveal"}
    harness = {"harness", "harness_include"}
    tuned = {"benign", "earlier", "learning_rate", "tuning"}
    left: dict[tuple[Any, Any], set[str]] = {
        (EraseInputs, RunInputs): set(),
        (ServeInputs, RunInputs): set(),
        (SweepInputs, RunInputs): {"base", "keep_adapter", "resume"},
        (EraseInputs, MeasureInputs): {*told, *harness, "members", "mmlu_shots", "records"},
        (SweepInputs, MeasureInputs): {*told, *harness, "members", "records"},
        (EraseInputs, AuditInputs): {*told, *tuned, "attacks", "cache", "original", "seed"},
        (VerifyInputs, AuditInputs): {*tuned, "forget", "paraphrases", "reveal"},
    }
    for (own, other), names in left.items():
        shared = {field.name for field in dataclasses.fields(own)}
        assert {field.name for field in dataclasses.fields(other)} - shared == names, (own, other)
