"""The order of rows: every epoch holds them all, by length, by weight and beside the other side."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_batches import PAD, examples

from expunge.data.sampling import (
    EpochBatches,
    epoch_order,
    systematic_sample,
)
from expunge.data.tokenization import Example


def seeded(purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(sum(map(ord, purpose)))


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=120),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 2**31),
)
def test_an_epoch_holds_every_row_once_in_an_order_that_the_seed_fixes(
    lengths: list[int], batch_size: int, seed: int
) -> None:
    def order() -> list[list[int]]:
        return epoch_order(lengths, batch_size, torch.Generator().manual_seed(seed))

    batches = order()
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert max(map(len, batches)) <= batch_size
    # Only what is left over at the end is a short batch.
    assert sum(len(batch) < batch_size for batch in batches) <= 1
    assert order() == batches


def test_two_epochs_and_two_seeds_differ() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (epoch_order([5] * 64, 4, generator) for _ in range(2))
    assert first != second
    assert first != epoch_order([5] * 64, 4, torch.Generator().manual_seed(1))


def test_rows_of_similar_length_share_a_batch() -> None:
    lengths = torch.randint(5, 400, (256,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = epoch_order(lengths, 8, torch.Generator().manual_seed(0))
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    shuffled = [list(range(start, start + 8)) for start in range(0, 256, 8)]
    unsorted = sum(len(batch) * max(lengths[i] for i in batch) for batch in shuffled)
    assert padded < 1.15 * sum(lengths) < unsorted
    # And they do not come sorted: the longest batch is not always last.
    widths = [max(lengths[i] for i in batch) for batch in batches]
    assert widths != sorted(widths)


@pytest.mark.parametrize("by_length", [True, False])
def test_the_batch_of_a_step_depends_on_the_seed_and_the_step_alone(by_length: bool) -> None:
    rows = examples([3, 5, 2, 7, 4])

    def batches() -> EpochBatches:
        return EpochBatches(
            rows, 2, PAD, lambda epoch: torch.Generator().manual_seed(epoch), by_length=by_length
        )

    one = batches()
    order = [one.at(step).row_ids for step in range(1, 10)]
    for epoch in range(3):
        assert Counter(name for ids in order[3 * epoch : 3 * epoch + 3] for name in ids) == Counter(
            "01234"
        )
    assert len(set(map(tuple, (order[:3], order[3:6], order[6:])))) > 1
    # Jumped to, as a resumed run does.
    for step in (8, 1, 5, 5):
        assert batches().at(step).row_ids == order[step - 1]


def weighted(weights: list[float]) -> list[Example]:
    rows = examples([3 + number % 5 for number in range(len(weights))])
    return [dataclasses.replace(e, weight=w) for e, w in zip(rows, weights, strict=True)]


def epochs(rows: list[Example], batch_size: int, seed: int, count: int) -> list[list[list[int]]]:
    batches = EpochBatches(
        rows, batch_size, PAD, lambda epoch: torch.Generator().manual_seed(seed * 1000 + epoch)
    )
    size = batches.batches_an_epoch
    return [
        [batches.indices(step) for step in range(e * size + 1, (e + 1) * size + 1)] for e in range(count)
    ]


@given(
    weights=st.lists(st.floats(1, 4.5), min_size=1, max_size=40),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 999),
)
def test_a_weighted_epoch_holds_every_row_and_none_twice_in_a_batch(
    weights: list[float], batch_size: int, seed: int
) -> None:
    for epoch in epochs(weighted(weights), batch_size, seed, 2):
        assert {index for batch in epoch for index in batch} == set(range(len(weights)))
        for batch in epoch:
            assert 1 <= len(set(batch)) == len(batch) <= batch_size
        taken = Counter(index for batch in epoch for index in batch)
        for index, count in taken.items():
            # Once with all, and once in each round; a weight of 1 is in no round.
            assert count <= (1 if weights[index] == 1 else math.ceil(max(weights)))


def test_rows_are_taken_as_often_as_their_weights_say() -> None:
    weights = [1.0] * 20 + [1.5] * 20 + [3.0] * 20
    count = 200
    taken = Counter(
        index for epoch in epochs(weighted(weights), 8, 0, count) for b in epoch for index in b
    )
    for index, weight in enumerate(weights):
        # Three standard errors of 400 draws of chance 1/4 are 26, an eighth of 200 epochs.
        assert taken[index] / count == pytest.approx(weight, abs=0.13)
    assert {taken[index] for index in range(20)} == {count}


def test_weights_of_one_change_no_order() -> None:
    plain = epochs(examples([3 + number % 5 for number in range(11)]), 4, 3, 3)
    assert plain == epochs(weighted([1.0] * 11), 4, 3, 3)


def test_a_weighted_step_depends_on_the_seed_and_the_step_alone() -> None:
    rows = weighted([1.0, 2.5, 4.0, 1.2, 3.0, 1.0, 2.0])

    def batches() -> EpochBatches:
        return EpochBatches(rows, 2, PAD, lambda epoch: torch.Generator().manual_seed(epoch))

    one = batches()
    order = [one.at(step).row_ids for step in range(1, 40)]
    for step in (39, 1, 17, 17):
        assert batches().at(step).row_ids == order[step - 1]


def test_a_weight_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="below 1"):
        EpochBatches(weighted([0.5]), 1, PAD, lambda _: torch.Generator())


@given(
    shares=st.lists(st.integers(0, 2**20), min_size=1, max_size=30).filter(any),
    seed=st.integers(0, 999),
)
def test_a_systematic_sample_has_its_size_and_no_row_twice(shares: list[int], seed: int) -> None:
    count = sum(shares) // max(shares)
    chosen = systematic_sample(shares, count, torch.Generator().manual_seed(seed))
    assert len(chosen) == len(set(chosen)) == count
    assert all(shares[index] > 0 for index in chosen)
