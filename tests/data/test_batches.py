"""Padding, masks and the order of batches."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expunge.data.batches import EpochBatches, collate, epoch_order, in_order
from expunge.data.tokenization import Example

PAD = 9


def example(length: int, name: str = "row") -> Example:
    """A BOS that is not counted, a prompt of one token, then answer tokens."""
    token = (False,) + (True,) * (length - 1)
    answer = (False, False, *[True] * length)[:length]
    return Example(name, f"task of {name}", tuple(range(10, 10 + length)), token, answer)


def examples(lengths: list[int]) -> list[Example]:
    return [example(length, str(number)) for number, length in enumerate(lengths)]


def test_rows_are_padded_on_the_right_and_padding_counts_nowhere() -> None:
    batch = collate(examples([4, 2, 3]), [2, 0], PAD)
    assert batch.input_ids.tolist() == [[10, 11, 12, PAD], [10, 11, 12, 13]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch.token_mask.tolist() == [[False, True, True, False], [False, True, True, True]]
    assert batch.answer_mask.tolist() == [[False, False, True, False], [False, False, True, True]]
    assert batch.row_ids == ("2", "0")
    assert batch.tasks == ("task of 2", "task of 0")
    assert batch.indices == (2, 0)
    assert batch.input_ids.dtype == batch.attention_mask.dtype == torch.long
    assert batch.mask("all") is batch.token_mask
    assert batch.mask("answer") is batch.answer_mask


def test_moving_a_batch_keeps_everything_else() -> None:
    batch = collate(examples([3, 2]), [1, 0], PAD)
    moved = batch.to("meta")
    assert (moved.row_ids, moved.tasks, moved.indices) == (batch.row_ids, batch.tasks, (1, 0))
    for name in ("input_ids", "attention_mask", "token_mask", "answer_mask"):
        assert getattr(moved, name).device.type == "meta"
        assert getattr(moved, name).shape == getattr(batch, name).shape


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


def test_rows_of_a_batch_lose_padding_they_do_not_need() -> None:
    batch = collate(examples([3, 5, 2, 7]), range(4), PAD)
    part = batch.rows(1, 3)
    assert part.row_ids == ("1", "2")
    assert part.input_ids.shape == (2, 5)
    assert part.lengths == [5, 2]
    assert torch.equal(part.packed(part.input_ids), batch.packed(batch.input_ids)[3:10])


def test_in_order_starts_with_the_longest_and_takes_each_once() -> None:
    batches = list(in_order(examples([3, 5, 2, 7, 4]), 2, PAD))
    assert [batch.indices for batch in batches] == [(3, 1), (4, 0), (2,)]


def test_content_is_all_of_a_continuation_and_the_answer_of_a_question() -> None:
    document = Example(
        "d", "t", (5, 6, 7, 8), (False, True, True, True), (False, False, True, True)
    )
    question = dataclasses.replace(document, row_id="q", kind="qa")
    batch = collate([document, question], [0, 1], 0)
    assert batch.mask("content").tolist() == [[False, True, True, True], [False, False, True, True]]
    assert batch.mask("all")[1].tolist() == [False, True, True, True]
    assert batch.mask("answer")[0].tolist() == [False, False, True, True]
