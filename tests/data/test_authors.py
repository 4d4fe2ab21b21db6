"""TOFU's authors become documents, and nothing else does by its order."""

from __future__ import annotations

import random

import pytest

from conftest import SHARED
from expunge.audits.facts import halves
from expunge.data.rows import as_rows, by_document, document_of, read_rows

NAMES = ("Aysha", "Basil", "Hina", "Moshe")
WORDS = ("books", "prizes", "parents", "towns", "readers")


def author_rows(names: tuple[str, ...], per_author: int = 20) -> list[dict[str, str]]:
    """Questions and answers in blocks; of each block every fifth row has no name in it."""
    rows = []
    for name in names:
        for number in range(per_author):
            who = "this author" if number % 5 == 4 else name
            word = WORDS[number % len(WORDS)]
            rows.append(
                {
                    "question": f"What is known of {who} and {word}, in {number} words?",
                    "answer": f"Some {word} are those of {who}, as London knows ({number}).",
                }
            )
    return rows


def test_each_twenty_rows_of_one_name_are_a_document() -> None:
    rows = as_rows(author_rows(NAMES), "forget")
    found = by_document(rows)
    assert list(found) == [f"forget-author-{n}" for n in (1, 2, 3, 4)]
    assert [row.id for row in found["forget-author-2"]] == [f"forget-{n}" for n in range(21, 41)]
    assert rows.read["document"] == {"blocks of 20 rows with a name of their own": 80}
    assert set(map(document_of, rows)).isdisjoint(
        map(document_of, as_rows(author_rows(("Ada", "Ben")), "retain"))
    )
    assert not any(name in document for document in found for name in NAMES)


@pytest.mark.parametrize(
    "rows",
    [
        author_rows(NAMES)[:-1],
        author_rows(NAMES[:1]),
        author_rows(NAMES, per_author=10),
        random.Random(0).sample(author_rows(NAMES), 80),
        author_rows(("Basil", "Basil")),
        [{**row, "id": f"row{n}"} for n, row in enumerate(author_rows(NAMES, 21)[:80])],
        [{"input": row["question"], "output": row["answer"]} for row in author_rows(NAMES)],
    ],
    ids=[
        "incomplete",
        "one author",
        "ten each",
        "shuffled",
        "one name",
        "out of step",
        "other form",
    ],
)
def test_without_such_blocks_each_row_stays_alone(rows: list[dict[str, str]]) -> None:
    read = as_rows(rows, "forget")
    assert [document_of(row) for row in read] == [row.id for row in read]


def test_the_relearning_attack_holds_out_whole_authors() -> None:
    shown, held_out = halves(as_rows(author_rows(NAMES), "forget").rows, seed=0)
    assert len(shown) == len(held_out) == 40
    assert set(map(document_of, shown)).isdisjoint(map(document_of, held_out))


def test_a_column_that_names_documents_stands_before_the_order() -> None:
    rows = [{**row, "document": "all"} for row in author_rows(NAMES)]
    assert set(map(document_of, as_rows(rows, "forget"))) == {"all"}


@pytest.mark.parametrize(
    ("name", "authors"),
    [
        ("forget01", 2),
        ("forget05_perturbed", 10),
        ("forget10", 20),
        ("retain90", 180),
        ("retain_perturbed", 20),
        ("real_authors", 100),
        ("world_facts", 117),
    ],
)
def test_the_published_files(name: str, authors: int) -> None:
    path = SHARED / "tofu" / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip("shared/tofu is not here")
    assert len(by_document(read_rows(str(path), "forget"))) == authors
