"""Near repeats, shared documents and subjects: what is listed and what is not."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import SHARED
from expunge.analysis.overlap import (
    CONTAINMENT,
    RUN,
    Overlap,
    names_in,
    near_repeats,
    overlaps,
    runs,
    same_subjects,
)
from expunge.data.rows import Row, read_rows

LONG = "The quiet harbour town woke early and its nine red boats left before the bells had rung"


def row(name: str, text: str) -> Row:
    head, _, tail = text.partition(" ")
    return Row(name, head, tail)


def test_words_are_normalised() -> None:
    (run,) = runs("Don\u2019t  STOP, caf\u0065\u0301_bar!")
    assert run == ("don", "t", "stop", "café", "bar")
    assert len(runs("東京都は大きい。")) == 3  # no blank parts its words, so each letter is one
    assert runs("one two") == {("one", "two")}
    assert len(runs("a b c d e f g")) == 3


texts = st.lists(st.sampled_from("abcd"), min_size=1, max_size=14).map(" ".join)


@given(st.lists(texts, min_size=1, max_size=5), texts)
def test_near_repeats_are_those_of_every_pair_compared(forget: list[str], kept: str) -> None:
    """Against runs cut one by one and every pair compared, without an index."""

    def cut(text: str) -> set[str]:
        parts = text.split()
        size = min(RUN, len(parts))
        return {" ".join(parts[i : i + size]) for i in range(len(parts) - size + 1)}

    expected = {}
    for number, text in enumerate(forget):
        shared = len(cut(text) & cut(kept))
        share = shared / min(len(cut(text)), len(cut(kept)))
        if shared and share >= CONTAINMENT:
            expected[f"f{number}"] = share, shared / len(cut(text) | cut(kept))
    # A row has an input and an output, so one word cannot be a row; its text is joined anyway.
    rows = [Row(f"f{number}", text, "") for number, text in enumerate(forget)]
    found = list(near_repeats(rows, [Row("k", kept, "")]))
    if not expected:
        assert found == []
        return
    (overlap,) = found
    assert set(overlap.forget) == set(expected)
    assert (overlap.containment, overlap.jaccard) == max(expected.values())


def test_a_planted_repeat_is_found_whatever_its_case_and_marks() -> None:
    planted = [
        row("same", LONG.upper().replace(" ", "  ") + "!"),
        row("edited", LONG.replace("nine red", "seven blue")),
        row("part", " ".join(LONG.split()[2:12])),
        row("other", "A glacier keeps its own slow calendar of dust and light in every blue layer"),
    ]
    found = {o.retain: o for o in overlaps([row("f", LONG)], planted)}
    assert set(found) == {"same", "edited", "part"}
    assert all(o.reason == "near repeat" and o.forget == ("f",) for o in found.values())
    assert (found["same"].containment, found["same"].jaccard) == (1.0, 1.0)
    assert found["part"].containment == 1.0
    assert found["part"].jaccard is not None
    assert found["part"].jaccard < 0.6


def test_rows_of_one_document_are_listed_by_their_ids() -> None:
    forget = [row("doc7sc1", LONG), row("plain", "entirely different words stand here")]
    retain = [
        row("doc7qa0", "Which bells rang?"),
        row("plain2", "and others again stand there"),
        row("doc7qa10", "Who heard them?"),
    ]
    found = overlaps(forget, retain)
    assert [(o.retain, o.reason, o.forget) for o in found] == [
        ("doc7qa0", "same document", ("doc7sc1",)),
        ("doc7qa10", "same document", ("doc7sc1",)),
    ]


def test_names_are_runs_of_capitalised_words() -> None:
    text = "Who is Anna van der Berg's cousin? In Old York, Dr Ludwig O'Neil met her. BBC News"
    assert set(names_in(text)) == {"anna van der berg", "old york", "dr ludwig o'neil"}
    assert names_in("Anna Berg sang")["anna berg"] == 0
    assert names_in("The lonely city of Rome") == {}


def people(count: int) -> list[Row]:
    names = [f"Person{chr(97 + i)} Surname{chr(97 + i)}" for i in range(count)]
    return [row(f"p{i}sc1", f"{name} was born in New York long ago") for i, name in enumerate(names)]


def test_the_subject_of_a_document_links_it_and_a_common_name_does_not() -> None:
    forget = [
        *people(5),
        row("a1sc1", "Mira Voss was born in New York"),
        row("a1qa0", "Who is Mira Voss?"),
    ]
    retain = [
        row("b1sc1", "Tom Hale was born in New York and married Mira Voss there"),
        row("b2sc1", "Ann Bell was born in New York and nowhere else"),
    ]
    (found,) = same_subjects(forget, retain)
    assert (found.retain, found.reason, found.count) == ("b1sc1", "same subject", 2)
    assert found.forget == ("a1sc1", "a1qa0")
    assert found.subjects == ("mira voss",)
    assert "mira" not in repr(found)


def test_a_name_that_is_nobodys_subject_links_nothing() -> None:
    forget = [row("a1sc1", "Mira Voss was seen by Tom Hale")]
    retain = [row("b1sc1", "Ann Bell was seen by Tom Hale")]
    assert list(same_subjects(forget, retain)) == []


@pytest.mark.skipif(not (SHARED / "lume").is_dir(), reason="shared/lume is not there")
def test_on_lume_few_rows_are_listed_and_planted_ones_are_found() -> None:
    """LUME's sets share no document and no person; its templates must not count as repeats."""
    forget = list(read_rows(str(SHARED / "lume" / "forget.jsonl"), "forget"))
    retain = list(read_rows(str(SHARED / "lume" / "retain.jsonl"), "retain"))
    found = overlaps(forget, retain)
    assert not [o for o in found if o.reason != "same subject"]
    assert len(found) <= 10  # a person named in another's biography, and stories set in one city
    documents = [r for r in forget if r.kind == "sc"][:60]
    planted = []
    for number, document in enumerate(documents):
        parts = document.text.split()
        parts[:: len(parts) // 4] = ["changed"] * len(parts[:: len(parts) // 4])
        planted.append(row(f"planted{number}", " ".join(parts)))
    listed: list[Overlap] = [
        o for o in overlaps(forget, [*retain, *planted]) if o.reason == "near repeat"
    ]
    by_row = {o.retain: o for o in listed}
    # A short document with every fourth part changed may fall below one half; few are so short.
    hits = sum(
        document.id in by_row[f"planted{n}"].forget
        for n, document in enumerate(documents)
        if f"planted{n}" in by_row
    )
    assert hits >= 0.95 * len(documents)
    assert set(by_row) <= {f"planted{n}" for n in range(len(planted))}
    assert all(a.retain != b.retain for a, b in itertools.pairwise(listed))
