"""The formulas of SemEval-2025 Task 4 against slow references."""

from __future__ import annotations

import math
import re
import unicodedata
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nltk.stem.porter import PorterStemmer  # type: ignore[import-untyped]

from conftest import refusal
from expunge.audits.facts import score
from expunge.data.rows import Row, as_rows, check_disjoint
from expunge.evaluation.scores import final_score, knowledge, regurgitation, task_aggregate
from expunge.maths.membership import is_chance, membership_auc, membership_score


def lcs(first: list[str], second: list[str]) -> int:
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def rouge_l_recall(reference: str, text: str) -> float:
    """Lin 2004 with the task's stemmer: words of more than three letters are stemmed."""
    stem = PorterStemmer().stem

    def words(value: str) -> list[str]:
        found = re.findall(r"[a-z0-9]+", value.lower())
        return [stem(word) if len(word) > 3 else word for word in found]

    wanted = words(reference)
    return lcs(wanted, words(text)) / len(wanted) if wanted else 0.0


VOCABULARY = ["running", "runs", "ran", "the", "The", "cities", "city,", "900-11", "Ada's", "a"]
WORDS = st.lists(st.sampled_from(VOCABULARY), max_size=9).map(" ".join)


@given(reference=WORDS, text=WORDS)
def test_regurgitation_is_rouge_l_recall_with_stemmer(reference: str, text: str) -> None:
    assert regurgitation(reference, text) == pytest.approx(rouge_l_recall(reference, text))


@pytest.mark.parametrize(
    ("reference", "text", "expected"),
    [
        ("she lives in Paris now", "she lives in Paris now and more and more", 1.0),  # recall
        ("she lives in Paris now", "now in lives she", 0.2),  # order counts
        ("cities", "city", 1.0),
        ("one two", "", 0.0),
    ],
)
def test_regurgitation_on_examples(reference: str, text: str, expected: float) -> None:
    assert regurgitation(reference, text) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("Paris", 1.0), (" PARIS\n", 1.0), ("Paris.", 0.0), ("In Paris", 0.0), ("", 0.0)],
)
def test_knowledge_is_exact_after_strip_and_lower(answer: str, expected: float) -> None:
    assert knowledge(" paris ", answer) == expected


SHARES = st.lists(st.floats(0.01, 0.99), min_size=1, max_size=6)


@given(forget=SHARES, retain=SHARES)
def test_the_aggregate_is_the_harmonic_mean_of_what_is_gone_and_what_stayed(
    forget: list[float], retain: list[float]
) -> None:
    parts = [1 - value for value in forget] + retain
    expected = len(parts) / sum(1 / part for part in parts)
    assert task_aggregate(forget, retain) == pytest.approx(expected)
    assert min(parts) - 1e-12 <= expected <= max(parts) + 1e-12


@pytest.mark.parametrize(("forget", "retain"), [([1.0, 0.0], [1.0]), ([0.0], [0.9, 0.0])])
def test_the_aggregate_is_0_if_any_part_is(forget: list[float], retain: list[float]) -> None:
    assert task_aggregate(forget, retain) == 0


def test_the_aggregate_of_a_perfect_model_is_1() -> None:
    assert task_aggregate([0.0, 0.0], [1.0]) == 1


def test_a_final_score_needs_all_three() -> None:
    assert final_score(0.3, 0.6, 0.9) == pytest.approx(0.6)
    assert final_score(None, 0.6, 0.9) is None
    assert final_score(0.3, None, 0.9) is None
    assert final_score(0.3, 0.6, None) is None
    assert final_score(0.0, 0.0, 0.0) == 0  # 0 is a measurement


LOSSES = st.lists(st.integers(0, 6).map(float), min_size=1, max_size=12)


@given(members=LOSSES, others=LOSSES)
def test_the_auc_counts_pairs_in_which_the_member_has_the_lower_loss(
    members: list[float], others: list[float]
) -> None:
    pairs = [(a < b) + 0.5 * (a == b) for a in members for b in others]
    auc = membership_auc(members, others)
    assert auc == pytest.approx(sum(pairs) / len(pairs))
    assert membership_score(auc) == pytest.approx(1 - 2 * abs(auc - 0.5))


@pytest.mark.parametrize(("auc", "expected"), [(0.5, 1.0), (1.0, 0.0), (0.0, 0.0), (0.75, 0.5)])
def test_both_ends_of_the_auc_score_0(auc: float, expected: float) -> None:
    assert math.isclose(membership_score(auc), expected)


@pytest.mark.parametrize(
    ("reference", "text", "expected"),
    [
        ("Москва, 1905", "Москва, 1905", 1.0),
        ("Москва, 1905", "1905", 0.5),  # the year alone
        ("Она живёт в Осло с 1905 года", "Она живёт в Осло с 1906 года", 6 / 7),
        ("東京都", "京都", 2 / 3),
        ("東京都", "Tokyo", 0.0),
        ("彼女は1905年に東京で生まれた", "1905", 1 / 13),
        ("ラーメン屋のAda", "ラーメン屋の", 6 / 7),
        ("وُلدت سنة ١٩٠٥", "وُلدت سنة ١٩٠٦", 2 / 3),
        ("Η Αθήνα το 1905", "η αθήνα", 0.5),
        ("हिन्दी भाषा 5", "हिन्दी", 1 / 3),  # vowel signs part no word
        ("กรุงเทพ", "กรุง", 1 / 2),
        ("서울에서 1905년", "서울에서", 1 / 3),
        ("Łódź", "d", 1.0),  # Latin text: the protocol's words, whatever it drops
        ("5 µm, ½ of x² in Ångström", "5 m of x in ngstr m", 1.0),
        ("é", "é", 1.0),
        ("é", "e", 0.0),
    ],
)
def test_words_of_every_script_count(reference: str, text: str, expected: float) -> None:
    """The protocol's tokenizer drops other scripts: one number would be scored for a whole text."""
    assert regurgitation(reference, text) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["Übergrößen naïve Ångström", "Йод и Ёлка", "한국어", "é"])
def test_the_unicode_form_of_a_text_does_not_matter(text: str) -> None:
    """Tokenizers that normalise to NFC write an answer in another form than its row may have."""
    composed, parted = unicodedata.normalize("NFC", text), unicodedata.normalize("NFD", text)
    assert composed != parted
    row = Row("a", "Where?", parted, kind="qa")
    assert knowledge(parted, composed) == knowledge(composed, parted) == 1
    assert regurgitation(parted, composed) == regurgitation(composed, parted) == 1
    assert score(row, f"So: {composed}.") == 1
    other = replace(row, id="b", output=composed)
    message = refusal(lambda: check_disjoint(as_rows([row], "forget"), as_rows([other], "retain")))
    assert "hold the same rows" in message


@pytest.mark.parametrize(("members", "others"), [(1, 39), (1, 38), (2, 9), (4, 5), (5, 4), (25, 30)])
def test_what_chance_gives_is_that_of_the_exact_rank_sum_test(members: int, others: int) -> None:
    from scipy.stats import mannwhitneyu

    for won in range(members * others + 1):
        # Others at 0, 1, ...; each member wins `won` pairs in part.
        wins = [min(others, max(0, won - others * n)) for n in range(members)]
        exact = mannwhitneyu(
            [w - 0.5 - n / 99 for n, w in enumerate(wins)], range(others), method="exact"
        )
        if members < 20 or abs(exact.pvalue - 0.05) > 0.01:
            assert is_chance(won / members / others, members, others) == (exact.pvalue > 0.05), won
