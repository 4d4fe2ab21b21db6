"""Tokens as readable pieces with their probabilities."""

from __future__ import annotations

import math
from typing import Any

import pytest

from expunge.web.asking import Answer, Token
from expunge.web.pieces import (
    BOUNDS,
    STEPS,
    first_difference,
    pieces_of,
    step_of,
    typical_probability,
    written,
)


def answer(ids: list[int], probabilities: list[float] | None = None, **more: Any) -> Answer:
    chances = probabilities or [0.5] * len(ids)
    return Answer([Token(i, p) for i, p in zip(ids, chances, strict=True)], **more)


@pytest.mark.parametrize(
    "text",
    ["Paris and her number", "é ü 漢字 🙂", "a\n\tb", "  two  spaces ", "<script>x</script>"],
)
def test_the_pieces_make_up_the_decoded_text(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    pieces = pieces_of(answer(ids, ending="length"), tokenizer)
    assert "".join(piece.text for piece in pieces) == tokenizer.decode(ids) == text
    assert sum(piece.tokens for piece in pieces) == len(ids)


def test_tokens_of_one_character_wait_for_each_other(tokenizer: Any) -> None:
    ids = tokenizer("x🙂")["input_ids"]
    assert len(ids) == 5  # one letter, four bytes
    chances = [0.9, 0.5, 0.5, 0.5, 0.5]
    pieces = pieces_of(answer(ids, chances, ending="length"), tokenizer)
    assert [(p.text, p.tokens) for p in pieces] == [("x", 1), ("🙂", 4)]
    assert pieces[1].probability == pytest.approx(0.0625)
    assert pieces[1].told == "probability 0.062, 4 tokens"
    # Half of it is not shown while it is written, and shown as what it is once nothing follows.
    assert [p.text for p in pieces_of(answer(ids[:3]), tokenizer)] == ["x"]
    last = pieces_of(answer(ids[:3], ending="length"), tokenizer)[-1]
    assert last.tokens == 2
    assert "\ufffd" in last.text


def test_the_end_of_text_is_a_piece_of_its_own(tokenizer: Any) -> None:
    ids = [*tokenizer("Oslo")["input_ids"], tokenizer.eos_token_id]
    pieces = pieces_of(answer(ids, ending="end of text"), tokenizer)
    assert (pieces[-1].text, pieces[-1].special) == ("<|end|>", True)
    assert "".join(p.text for p in pieces if not p.special) == "Oslo"


def test_text_that_looks_like_a_special_token_is_text(tokenizer: Any) -> None:
    ids = [i for part in ("<", "|", "end", "|", ">") for i in tokenizer(part)["input_ids"]]
    pieces = pieces_of(answer(ids, ending="length"), tokenizer)
    assert not any(piece.special for piece in pieces)
    assert "".join(piece.text for piece in pieces) == "<|end|>"


def test_steps_of_colour() -> None:
    assert len(STEPS) == len(BOUNDS) + 1
    assert [step_of(p) for p in (0.0, 0.0099, 0.01, 0.1, 0.4999, 0.5, 0.9, 1.0)] == [
        0, 0, 1, 2, 2, 3, 4, 4
    ]  # fmt: skip


def test_a_probability_never_reads_as_0_or_1_that_it_is_not() -> None:
    assert [written(p) for p in (0.0, 1e-9, 0.0006, 0.5, 0.99951, 1.0)] == [
        "0.000", "below 0.001", "0.001", "0.500", "above 0.999", "1.000"
    ]  # fmt: skip


def test_the_typical_probability_is_the_geometric_mean() -> None:
    assert typical_probability(answer([])) is None
    assert typical_probability(answer([1, 2], [0.0, 1.0])) == 0.0
    chances = [0.9, 0.1, 0.4]
    assert typical_probability(answer([1, 2, 3], chances)) == pytest.approx(
        math.prod(chances) ** (1 / 3)
    )
    # The probability of the whole answer comes back.
    many = [0.3] * 500
    assert typical_probability(answer(list(range(500)), many)) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [([], [], None), ([1, 2], [1, 2], None), ([1, 2], [1, 3], 2), ([1], [1, 2], 2), ([], [4], 1)],
)
def test_where_two_answers_part(one: list[int], other: list[int], expected: int | None) -> None:
    assert first_difference(answer(one), answer(other)) == expected
    assert first_difference(answer(other), answer(one)) == expected
