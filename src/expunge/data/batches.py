"""Padded batches of examples, with the masks of what a loss counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from expunge.data.tokenization import Example

PAD_ID = 0
"""What padding is filled with: it is masked everywhere, and every model has an embedding for it. A
tokenizer's own may be beyond them, where it was added to the tokenizer alone."""
Tokens = Literal["all", "answer", "content"]
"""The whole text; the output given the input; continuations whole and of questions the answer."""


@dataclass(frozen=True, repr=False)
class Batch:
    """Right-padded examples; every tensor is (rows, tokens)."""

    examples: tuple[Example, ...]
    indices: tuple[int, ...]
    """Positions of the examples in the list that the batch was drawn from."""
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    token_mask: torch.Tensor
    answer_mask: torch.Tensor
    is_idle: bool = False
    """Whether its rows count for nothing: a loss must be given some where a step has none left."""

    @property
    def row_ids(self) -> tuple[str, ...]:
        """The rows' ids."""
        return tuple(example.row_id for example in self.examples)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The rows' tasks."""
        return tuple(example.task for example in self.examples)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row, without padding."""
        return [len(example) for example in self.examples]

    def packed(self, values: torch.Tensor) -> torch.Tensor:
        """(rows, tokens, ...) -> (all rows' tokens, ...): padding left out."""
        return values[self.attention_mask.bool()]

    def mask(self, tokens: Tokens) -> torch.Tensor:
        """Boolean mask of the tokens that a loss counts."""
        if tokens == "content":
            questions = torch.tensor([example.kind == "qa" for example in self.examples])
            whole = ~questions.to(self.token_mask.device)[:, None]
            return self.answer_mask | (self.token_mask & whole)
        return self.token_mask if tokens == "all" else self.answer_mask

    def idle(self) -> Batch:
        """One row that counts for nothing."""
        return replace(self.rows(0, 1), is_idle=True)

    def rows(self, begin: int, end: int) -> Batch:
        """Some of the rows, with no more padding than they need."""
        return self._chosen(list(range(len(self.examples))[begin:end]))

    def split(self, first: Sequence[bool]) -> tuple[Batch | None, Batch | None]:
        """The rows marked in `first`, and the others; None where there is none."""
        sides: tuple[list[int], list[int]] = ([], [])
        for row, is_first in enumerate(first):
            sides[not is_first].append(row)
        if not all(sides):
            return (self, None) if sides[0] else (None, self)
        return self._chosen(sides[0]), self._chosen(sides[1])

    def _chosen(self, rows: list[int]) -> Batch:
        chosen = tuple(self.examples[row] for row in rows)
        width = max(map(len, chosen))
        indices = tuple(self.indices[row] for row in rows)
        cut = self._with(lambda tensor: tensor[rows, :width])
        return replace(cut, examples=chosen, indices=indices)

    def to(self, device: torch.device | str) -> Batch:
        """The batch with its tensors on `device`."""
        return self._with(lambda tensor: tensor.to(device))

    def _with(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        held = vars(self).items()
        tensors: Any = {name: change(value) for name, value in held if torch.is_tensor(value)}
        return replace(self, **tensors)


def collate(examples: Sequence[Example], indices: Sequence[int], pad_id: int) -> Batch:
    """Pads `examples[i] for i in indices` on the right to the longest of them."""
    chosen = [examples[index] for index in indices]
    width = max(map(len, chosen))

    def padded(rows: list[Sequence[int]], value: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=dtype)

    return Batch(
        tuple(chosen),
        tuple(indices),
        padded([example.input_ids for example in chosen], pad_id, torch.long),
        padded([[1] * len(example) for example in chosen], 0, torch.long),
        padded([example.token_mask for example in chosen], 0, torch.bool),
        padded([example.answer_mask for example in chosen], 0, torch.bool),
    )


def in_order(examples: Sequence[Example], batch_size: int, pad_id: int) -> Iterator[Batch]:
    """Every example once, longest first, so that memory peaks at the first batch."""
    order = sorted(range(len(examples)), key=lambda index: -len(examples[index]))
    for start in range(0, len(order), batch_size):
        yield collate(examples, order[start : start + batch_size], pad_id)
