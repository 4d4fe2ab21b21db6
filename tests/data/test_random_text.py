"""Rows of random tokens: seeded, without special tokens, and apart from the user's rows."""

from __future__ import annotations

from collections import Counter
from typing import Any

from expunge.data.batches import collate
from expunge.data.random_text import LENGTH, random_examples
from expunge.data.sampling import rows_a_step


def test_rows_are_seeded_and_as_long_as_the_context_allows(tokenizer: Any) -> None:
    rows = random_examples(5, tokenizer, 10**6, 512, seed=3)
    assert rows == random_examples(5, tokenizer, 10**6, 512, seed=3)
    assert rows != random_examples(5, tokenizer, 10**6, 512, seed=4)
    assert [len(row) for row in rows] == [LENGTH] * 5
    assert {len(row) for row in random_examples(2, tokenizer, 10**6, 16, seed=0)} == {16}
    assert random_examples(0, tokenizer, 10**6, 512, seed=0) == []
    assert len({row.row_id for row in rows}) == 5
    assert not any(row.listed for row in rows)


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
    users, others = mixed.split_listed()
    assert users is not None
    assert others is not None
    assert users.examples == tuple(listed)
    assert users.indices == (1, 3, 4)
    assert others.examples == tuple(random)
    assert others.input_ids.shape == (2, LENGTH)  # with no more padding than they need
    assert others.input_ids.tolist() == [list(row.input_ids) for row in random]
    only, none = collate(listed, range(3), 0).split_listed()
    assert none is None
    assert only is not None
    assert only.examples == tuple(listed)
    none, only = collate(random, range(2), 0).split_listed()
    assert none is None
    assert only is not None


def test_random_rows_come_on_top_of_a_steps_rows(tokenizer: Any) -> None:
    from conftest import random_examples as listed_examples

    listed = listed_examples([5] * 12, 300)
    random = random_examples(6, tokenizer, 10**6, 16, seed=0)
    assert rows_a_step(listed, 4) == 4
    assert rows_a_step([*listed, *random], 4) == 6
    assert rows_a_step(random, 4) == 4
