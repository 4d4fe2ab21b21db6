"""Membership inference: how far members can be told from non-members by one number a text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from expunge.data.batches import Batch
from expunge.maths.numerics import row_sums


class RowLosses:
    """Mean token loss of each row, gathered over batches; a row's windows count as one document."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, batch: Batch, log_probs: torch.Tensor) -> None:
        """Adds a batch's tokens; log_probs (rows, tokens - 1) as `token_log_probs` gives them."""
        mask = batch.token_mask[:, 1:]
        losses = row_sums(-log_probs, mask).tolist()
        for row, loss, count in zip(batch.row_ids, losses, mask.sum(1).tolist(), strict=True):
            self._sums[row] = self._sums.get(row, 0.0) + loss
            self._counts[row] = self._counts.get(row, 0) + count

    @classmethod
    def of_all(cls, parts: Iterable[RowLosses]) -> RowLosses:
        """What several processes gathered, as one; a row may be in more than one of them."""
        whole = cls()
        for part in parts:
            for row, total in part._sums.items():
                whole._sums[row] = whole._sums.get(row, 0.0) + total
                whole._counts[row] = whole._counts.get(row, 0) + part._counts[row]
        return whole

    def means(self) -> dict[str, float]:
        """Nats a token, by row id."""
        return {row: total / max(1, self._counts[row]) for row, total in self._sums.items()}


def membership_auc(members: Sequence[float], nonmembers: Sequence[float]) -> float:
    """AUC of the attack that calls a text of low loss a member, in [0, 1].

    1: not forgotten; 0: over-unlearned, members stand out by a higher loss. Raises ValueError for
    losses that are not finite.
    """
    if not all(map(math.isfinite, [*members, *nonmembers])):
        raise ValueError("a loss is not finite")
    ours = torch.tensor(members, dtype=torch.float64)
    theirs = torch.tensor(nonmembers, dtype=torch.float64).sort().values
    # Of each pair, the lower loss wins; equal ones share the point (Mann and Whitney, 1947).
    below, not_above = (torch.searchsorted(theirs, ours, right=right) for right in (False, True))
    return float(1 - (below + not_above).double().mean() / (2 * len(theirs)))


def is_chance(auc: float, members: int, nonmembers: int) -> bool:
    """Whether equal texts, of so many on each side, lie as far from an AUC of 0.5 in more than 5%.

    Mann and Whitney, 1947: of equal texts every order is equally likely. The number of orders with u
    pairs won is the coefficient of q^u in the Gaussian binomial; from 20 texts a side on it is normal.
    """
    pairs = members * nonmembers
    few, many = sorted((members, nonmembers))
    won = min(auc, 1 - auc) * pairs
    if few >= 20:
        deviation = math.sqrt(pairs * (members + nonmembers + 1) / 12)
        return abs(won - pairs / 2) < 1.96 * deviation
    orders = [1] + [0] * pairs
    for part in range(1, few + 1):
        for u in range(pairs, many + part - 1, -1):
            orders[u] -= orders[u - many - part]
        for u in range(part, pairs + 1):
            orders[u] += orders[u - part]
    below = sum(orders[: math.floor(won + 1e-9) + 1])
    return 2 * below > 0.05 * math.comb(members + nonmembers, members)


def membership_score(auc: float) -> float:
    """1 - 2|AUC - 0.5|: 1 where members cannot be told from non-members."""
    return 1 - 2 * abs(auc - 0.5)
