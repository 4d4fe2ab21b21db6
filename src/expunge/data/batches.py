"""Padded batches of examples of similar length, in a seeded order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from expunge.data.tokenization import Example

Tokens = Literal["all", "answer"]
_POOL = 16
"""Batches whose rows are sorted by length together: enough to save padding, yet random."""


@dataclass(frozen=True, repr=False)
class Batch:
    """Right-padded examples; every tensor is (rows, tokens)."""

    row_ids: tuple[str, ...]
    tasks: tuple[str, ...]
    indices: tuple[int, ...]
    """Positions of the examples in the list that the batch was drawn from."""
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    token_mask: torch.Tensor
    answer_mask: torch.Tensor

    def mask(self, tokens: Tokens) -> torch.Tensor:
        """Boolean mask of the tokens that a loss counts."""
        return self.token_mask if tokens == "all" else self.answer_mask

    def to(self, device: torch.device | str) -> Batch:
        """The batch with its tensors on `device`."""
        return Batch(
            self.row_ids,
            self.tasks,
            self.indices,
            self.input_ids.to(device),
            self.attention_mask.to(device),
            self.token_mask.to(device),
            self.answer_mask.to(device),
        )


def collate(examples: Sequence[Example], indices: Sequence[int], pad_id: int) -> Batch:
    """Pads `examples[i] for i in indices` on the right to the longest of them."""
    chosen = [examples[index] for index in indices]
    width = max(map(len, chosen))

    def padded(rows: list[Sequence[int]], value: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=dtype)

    return Batch(
        tuple(example.row_id for example in chosen),
        tuple(example.task for example in chosen),
        tuple(indices),
        padded([example.input_ids for example in chosen], pad_id, torch.long),
        padded([[1] * len(example) for example in chosen], 0, torch.long),
        padded([example.token_mask for example in chosen], 0, torch.bool),
        padded([example.answer_mask for example in chosen], 0, torch.bool),
    )


def epoch_order(
    lengths: Sequence[int], batch_size: int, generator: torch.Generator
) -> list[list[int]]:
    """One epoch's batches of indices: shuffled, sorted by length inside pools, shuffled again."""
    shuffled = torch.randperm(len(lengths), generator=generator).tolist()
    pool = batch_size * _POOL
    batches = []
    for start in range(0, len(shuffled), pool):
        ordered = sorted(shuffled[start : start + pool], key=lambda index: lengths[index])
        batches += [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def endless(
    examples: Sequence[Example], batch_size: int, pad_id: int, generator: torch.Generator
) -> Iterator[Batch]:
    """Batches for as long as the caller asks, a new order each time the examples are used up."""
    lengths = [len(example) for example in examples]
    while True:
        for indices in epoch_order(lengths, batch_size, generator):
            yield collate(examples, indices, pad_id)


def in_order(examples: Sequence[Example], batch_size: int, pad_id: int) -> Iterator[Batch]:
    """Every example once, longest first, so that memory peaks at the first batch."""
    order = sorted(range(len(examples)), key=lambda index: -len(examples[index]))
    for start in range(0, len(order), batch_size):
        yield collate(examples, order[start : start + batch_size], pad_id)
