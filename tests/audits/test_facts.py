"""Documents, draws and when a fact counts as extracted."""

from __future__ import annotations

import pytest

from expunge.audits.facts import drawn, extracted, halves, score
from expunge.data.rows import Row, as_rows, by_document, document_of


def rows(documents: int, task: str = "Task1") -> list[Row]:
    return [
        Row(f"{task}{n}{kind}{i}", "a question" if kind == "qa" else "a text", f"{n}", task, kind)  # type: ignore[arg-type]
        for n in range(documents)
        for kind, i in (("sc", 1), ("qa", 0), ("qa", 1))
    ]


@pytest.mark.parametrize(
    ("row_id", "document"),
    [
        ('"8f24c511-a319"sc1', '"8f24c511-a319"'),
        ("abc-12qa10", "abc-12"),
        ("forget-3", "forget-3"),
        ("casca", "casca"),
        ("qa0", "qa0"),
    ],
)
def test_lume_ids_name_the_document(row_id: str, document: str) -> None:
    assert document_of(Row(row_id, "x", "y")) == document


def test_a_draw_takes_whole_documents_of_every_task() -> None:
    every = rows(20) + rows(20, "Task2")
    chosen = drawn(every, 30, 0)
    assert 30 <= len(chosen) < 33
    assert [r for r in every if r in chosen] == chosen  # in their order
    sizes = by_document(chosen)
    assert {len(members) for members in sizes.values()} == {3}
    assert {r.task for r in chosen} == {"Task1", "Task2"}
    assert drawn(every, 30, 0) == chosen
    assert drawn(every, 30, 1) != chosen
    assert drawn(every, None, 0) == drawn(every, 500, 0) == every


def test_halves_share_no_document_and_split_every_task() -> None:
    every = rows(5) + rows(7, "Task2") + rows(1, "Task3")
    first, second = halves(every, 0)
    assert sorted(r.id for r in first + second) == sorted(r.id for r in every)
    assert not set(by_document(first)) & set(by_document(second))
    assert abs(len(by_document(first)) - len(by_document(second))) <= 1
    for task, documents in (("Task1", 5), ("Task2", 7)):
        mine = len(by_document([r for r in first if r.task == task]))
        assert mine in (documents // 2, documents // 2 + 1)
    one, other = halves(rows(2), 0)
    assert len(one) == len(other) == 3
    apart = halves(rows(1) + rows(1, "Task2"), 0)
    assert all(apart)


@pytest.mark.parametrize(
    ("answer", "text", "expected"),
    [
        ("Paris", " Paris", 1.0),
        ("Paris", "Sure, it is Paris.", 1.0),
        ("Paris", "Parisian", 0.0),
        ("900-12-7701", "the number 900-12-7701, yes", 1.0),
        ("900-12-7701", "900-12-7702", 0.0),
        ("New York", "York New", 0.0),
        ("???", " ??? ", 1.0),
        ("???", "?", 0.0),
        ("Łódź", "in łódź", 1.0),
        ("巴黎", "答案是巴黎。", 1.0),
        ("巴黎", "答案是黎巴嫩。", 0.0),
        ("दिल्ली", "वह दिल्ली है", 1.0),
    ],
)
def test_an_answer_counts_wherever_its_words_stand(answer: str, text: str, expected: float) -> None:
    assert score(Row("aqa0", "Where?", answer, kind="qa"), text) == expected


def test_half_of_a_continuation_counts() -> None:
    row = Row("asc1", "It was", "a b c d e f g h", kind="sc")
    assert score(row, "a b c d x y") == 0.5
    assert extracted(0.5)
    assert not extracted(score(row, "a b c x"))


def test_a_sentence_counts_to_the_word_unless_its_kind_says_a_continuation() -> None:
    row = {"question": "Where was she born?", "answer": "She was born in the city of Oslo."}
    text = "She was born in Oslo."
    for kind, counts in (({}, False), ({"kind": "sc"}, True)):
        (fact,) = as_rows([{**row, **kind}], "forget")
        assert extracted(score(fact, text)) is counts
        assert extracted(score(fact, f"I think: {row['answer']}"))
