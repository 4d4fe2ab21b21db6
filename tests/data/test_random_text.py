"""Rows of random tokens: seeded, without special tokens, and apart from the user's rows."""

from __future__ import annotations

import zlib
from collections import Counter
from typing import Any

import pytest
import torch

from conftest import with_ends
from expunge.data.batches import collate
from expunge.data.random_text import LENGTH, random_examples
from expunge.data.sampling import BesideRandom


def test_rows_are_seeded_and_as_long_as_the_context_allows(tokenizer: Any) -> None:
    rows = random_examples(5, tokenizer, 10**6, 512, seed=3)
    assert rows == random_examples(5, tokenizer, 10**6, 512, seed=3)
    assert rows != random_examples(5, tokenizer, 10**6, 512, seed=4)
    assert [len(row) for row in rows] == [LENGTH] * 5
    assert {len(row) for row in random_examples(2, tokenizer, 10**6, 16, seed=0)} == {16}
    assert random_examples(0, tokenizer, 10**6, 512, seed=0) == []
    assert len({row.row_id for row in rows}) == 5
    assert not any(row.listed for row in rows)


def test_they_begin_as_the_tokenizer_begins_a_text(tokenizer: Any) -> None:
    changed = with_ends(tokenizer, "<s> $A <|end|>")
    for row in random_examples(5, changed, 10**6, 16, seed=0):
        assert row.input_ids[0] == changed.bos_token_id
        assert set(row.input_ids[1:]).isdisjoint(changed.all_special_ids)
        assert row.token_mask == row.answer_mask == (False, *[True] * 15)


def test_every_token_but_the_special_ones_is_drawn_as_often(tokenizer: Any) -> None:
    rows = random_examples(2000, tokenizer, 10**6, 512, seed=0)
    counts = Counter(token for row in rows for token in row.input_ids)
    special = set(tokenizer.all_special_ids)
    assert special
    assert set(counts) == set(range(len(tokenizer))) - special
    mean = 2000 * LENGTH / len(counts)
    # Six standard deviations of a Poisson count.
    assert all(abs(count - mean) < 6 * mean**0.5 for count in counts.values())
    fewer = random_examples(50, tokenizer, 100, 512, seed=0)
    assert max(token for row in fewer for token in row.input_ids) < 100


def test_a_batch_comes_apart_into_the_users_rows_and_random_ones(tokenizer: Any) -> None:
    from conftest import random_examples as listed_examples

    listed = listed_examples([3, 70, 9], 300)
    random = random_examples(2, tokenizer, 10**6, 512, seed=0)
    mixed = collate([random[0], listed[0], random[1], listed[1], listed[2]], range(5), 0)
    users, others = mixed.split([row.listed for row in mixed.examples])
    assert users is not None
    assert others is not None
    assert users.examples == tuple(listed)
    assert users.indices == (1, 3, 4)
    assert others.examples == tuple(random)
    assert others.input_ids.shape == (2, LENGTH)  # with no more padding than they need
    assert others.input_ids.tolist() == [list(row.input_ids) for row in random]
    only, none = collate(listed, range(3), 0).split([row.listed for row in listed])
    assert none is None
    assert only is not None
    assert only.examples == tuple(listed)
    none, only = collate(random, range(2), 0).split([row.listed for row in random])
    assert none is None
    assert only is not None


@pytest.mark.parametrize("by_length", [True, False])
@pytest.mark.parametrize(("listed", "held", "size"), [(12, 6, 4), (10, 13, 4), (9, 1, 2), (5, 0, 2)])
def test_every_step_has_the_users_rows_and_its_share_of_random_ones(
    tokenizer: Any, listed: int, held: int, size: int, by_length: bool
) -> None:
    """Random rows are all of one length: sorted with the others they would be batches of their own."""
    from conftest import random_examples as listed_examples

    users = listed_examples([4 + 7 * (i % 3) for i in range(listed)], 300)
    rows = [*random_examples(held, tokenizer, 10**6, 16, seed=0), *users]
    batches = BesideRandom(rows, size, 0, seeded, by_length=by_length)
    steps = -(-listed // size)
    seen: Counter[int] = Counter()
    for step in range(1, 3 * steps + 1):
        batch = batches.indices(step)
        of_user = [index for index in batch if rows[index].listed]
        assert size >= len(of_user) >= 1
        assert abs(len(batch) - len(of_user) - held / steps) < 1
        assert len(set(of_user)) == len(of_user)
        seen.update(batch)
    assert set(seen.values()) == {3}  # three epochs: every row, the user's or not, three times
    assert [batches.indices(step) for step in (5, 2)] == [
        BesideRandom(rows, size, 0, seeded, by_length=by_length).indices(step) for step in (5, 2)
    ]


def test_each_half_of_a_step_has_random_rows(tokenizer: Any) -> None:
    from conftest import random_examples as listed_examples

    rows = [*listed_examples([5] * 16, 300), *random_examples(8, tokenizer, 10**6, 16, seed=0)]
    batch = BesideRandom(rows, 16, 0, seeded).indices(1)
    halves = [[rows[index].listed for index in half] for half in (batch[:12], batch[12:])]
    assert [sum(half) for half in halves] == [8, 8]


def seeded(purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(purpose.encode()))
