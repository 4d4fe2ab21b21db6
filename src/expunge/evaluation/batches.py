"""Batches by a budget of tokens: a batch of long rows holds fewer of them.

Several processes divide the batches that one would make, so that each is computed among the same
neighbours, to the same bits, whatever their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

_CPU_TOKENS = 1024
"""What a batch writes then stays in the caches of a core; 4,096 tokens took 1.5 times as long."""
_TOKENS = 8192


def rows_within(length: int, batch_size: int, device: torch.device) -> int:
    """Rows of `length` tokens that a batch takes: at least 1, at most `batch_size`."""
    budget = _CPU_TOKENS if device.type == "cpu" else _TOKENS
    return max(1, min(batch_size, budget // max(1, length)))


def token_batches(lengths: Sequence[int], batch_size: int, device: torch.device) -> list[list[int]]:
    """Indices of every row once, longest first, rows of similar length together."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    batches = []
    start = 0
    while start < len(order):
        count = rows_within(lengths[order[start]], batch_size, device)
        batches.append(order[start : start + count])
        start += count
    return batches


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
