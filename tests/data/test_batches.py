"""Padding, masks and the order of batches."""

from __future__ import annotations

import dataclasses

import torch

from expunge.data.batches import collate, in_order
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
    document = Example("d", "t", (5, 6, 7, 8), (False, True, True, True), (False, False, True, True))
    question = dataclasses.replace(document, row_id="q", kind="qa")
    batch = collate([document, question], [0, 1], 0)
    assert batch.mask("content").tolist() == [[False, True, True, True], [False, False, True, True]]
    assert batch.mask("all")[1].tolist() == [False, True, True, True]
    assert batch.mask("answer")[0].tolist() == [False, False, True, True]
