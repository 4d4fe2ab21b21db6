"""Batches by a budget of tokens: a batch of long rows holds fewer of them.

Several processes divide the batches that one would make, so that each is computed among the same
neighbours, to the same bits, whatever their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from expunge.models.rope import switch_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CPU_TOKENS = 1024
"""What a batch writes then stays in the caches of a core; 4,096 tokens took 1.5 times as long."""
_TOKENS = 8192


def rows_within(length: int, batch_size: int, device: torch.device) -> int:
    """Rows of `length` tokens that a batch takes: at least 1, at most `batch_size`."""
    budget = _CPU_TOKENS if device.type == "cpu" else _TOKENS
    return max(1, min(batch_size, budget // max(1, length)))


def token_batches(lengths: Sequence[int], batch_size: int, model: PreTrainedModel) -> list[list[int]]:
    """Indices of every row once, longest first, rows of similar length together.

    No batch has rows on both sides of a switch by length (LongRoPE).
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    switch = switch_of(model.config)
    batches = []
    start = 0
    while start < len(order):
        count = rows_within(lengths[order[start]], batch_size, model.device)
        batch = order[start : start + count]
        batches.append(batch[: on_first_side([lengths[index] for index in batch], switch)])
        start += len(batches[-1])
    return batches


def on_first_side(lengths: Sequence[int], switch: int) -> int:
    """How many of the rows, longest first, are on the side of the switch where the first is."""
    beyond = sum(length > switch for length in lengths)
    return beyond or len(lengths)


def in_runs(costs: Sequence[int], processes: int) -> list[int]:
    """The process, from 0, of each piece of work: neighbours together, equal costs for each process."""
    total = sum(costs)
    return [
        min(processes - 1, (2 * end - cost) * processes // max(1, 2 * total))
        for end, cost in zip(accumulate(costs), costs, strict=True)
    ]


def padded(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Token ids, (rows, longest), padded on the right.

    Such padding needs no mask, for no token looks ahead, and its id does not matter.
    """
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
