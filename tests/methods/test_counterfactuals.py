"""Documents with other names, numbers and rare words, and what they say a never-seen one costs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import astuple
from typing import Any

import pytest
import torch

from expunge.data.rows import Row
from expunge.maths.calibration import RowTokens
from expunge.methods.counterfactuals import exchanged, never_seen_like
from expunge.training.validation import ValidationSet, asked_otherwise, measure

FORGET = [
    Row(
        "f1",
        "Born in 1961, Ada Roe sold lanterns in Torun.",
        "Ada Roe kept the lanterns until 1983.",
        task="T",
        document="roe",
    ),
    Row("f2", "The town of Torun", "was known for the bells."),
]
OTHERS = [
    Row(f"r{n}", f"The mayor {name} lived in {place}", f"in the year {1900 + n} and {did}.")
    for n, (name, place, did) in enumerate(
        [("Ben Doe", "Lodz", "carved spoons"), ("Cy Poe", "Brno", "tuned organs")] * 10
    )
]


def words(row: Row) -> list[str]:
    return re.findall(r"\w+", row.text)


def test_names_and_numbers_change_and_rare_words_in_the_second_version_only() -> None:
    names, rare = exchanged(FORGET, OTHERS, 0)
    kept = {"in", "the", "and", "The"}
    for before, with_names, with_rare in zip(FORGET, names, rare, strict=True):
        changed = {a: b for a, b in zip(words(before), words(with_names), strict=True) if a != b}
        assert {"1961", "1983", "Ada", "Roe", "Torun"} & set(words(before)) <= set(changed)
        assert all(old.isdigit() or old[0].isupper() for old in changed)
        assert all(len(new) == len(old) for old, new in changed.items() if old.isdigit())
        pool = {"Ben", "Doe", "Lodz", "Cy", "Poe", "Brno", "Ada", "Roe", "Torun", "Born"}
        assert {new for old, new in changed.items() if not old.isdigit()} <= pool
        more = {a: b for a, b in zip(words(before), words(with_rare), strict=True) if a != b}
        assert {old for old in more if old.islower()}
        assert not kept & set(more)
        for version in (with_names, with_rare):
            assert astuple(version)[3:] == astuple(before)[3:]
            assert version.id == before.id
    # One word is the same other word wherever it stands in its row.
    both = dict(zip(words(FORGET[0]), words(names[0]), strict=True))
    assert [both[word] for word in words(FORGET[0])] == words(names[0])
    assert exchanged(FORGET, OTHERS, 0) == (names, rare)
    assert exchanged(FORGET, OTHERS, 1) != (names, rare)


def test_a_script_without_capitals_has_no_names() -> None:
    row = Row("f", "她住在河边的老房子里", "直到1961年")
    names, _ = exchanged([row], [], 0)
    assert names[0].input == row.input
    assert re.fullmatch(r"直到\d{4}年", names[0].output)


def test_a_row_costs_what_lies_between_its_two_versions() -> None:
    names, rare = {"a": 2.0, "b": 3.0}, {"a": 4.5, "b": 3.0}
    tokens = {"a": RowTokens(torch.tensor([3.0, 6.0]), torch.tensor([0.1, 0.2]))}
    found = never_seen_like(names, rare, tokens)
    assert found is not None
    losses, shared = found
    for row in names:
        assert losses[row] == pytest.approx(
            1.2 * math.exp((math.log(names[row]) + math.log(rare[row])) / 2)
        )
    assert float(shared["a"].losses.mean()) == pytest.approx(losses["a"])
    assert float(shared["a"].losses[1] / shared["a"].losses[0]) == pytest.approx(2.0)
    assert shared["a"].surprise is tokens["a"].surprise
    # What changes nothing tells nothing.
    assert never_seen_like({"a": 0.1, "b": 0.2}, rare, tokens) is None


def test_the_target_says_what_its_rows_are_to_cost(make_context: Callable[..., Any]) -> None:
    context = make_context()
    rows = ValidationSet(context.forget, context.retain, context.forget, (), "all")
    # Rows that are their own counterparts cost 1.2 times what they do.
    asked = asked_otherwise(context, rows, (context.forget, context.forget))
    assert asked is not None
    found = measure(context, asked).never_seen
    assert found is not None
    assert found.wanted == pytest.approx({row: 1.2 * loss for row, loss in found.losses.items()})
    for pair in found.pairs.values():
        torch.testing.assert_close(pair.wanted.losses, 1.2 * pair.reached.losses)
        torch.testing.assert_close(pair.wanted.surprise, pair.reached.surprise)
