"""How far forget rows are from looking never seen, row by row, as pure functions.

Membership inference compares the losses of forget documents with those of never-seen ones. Where each
forget document has the loss of the never-seen document of its own rank, the two distributions are the
same and no threshold on the loss tells them apart. Matching by rank is the transport between them that
moves the losses least, and its mean distance is their 1-Wasserstein distance.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch

_ENOUGH = 8
"""Never-seen rows of a group from which its forget rows are compared with that group alone."""


def matched_by_rank(values: Sequence[float], reference: Sequence[float]) -> list[float]:
    """For each value the quantile of `reference` at the value's own rank, (i + 1/2) / n."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = (torch.arange(len(values), dtype=torch.float64) + 0.5) / len(values)
    wanted = torch.quantile(torch.tensor(reference, dtype=torch.float64), ranks).tolist()
    matched = [0.0] * len(values)
    for index, quantile in zip(order, wanted, strict=True):
        matched[index] = quantile
    return matched


@dataclass(frozen=True)
class NeverSeen:
    """Forget rows beside never-seen ones; mean losses in nats a token, by row id."""

    losses: Mapping[str, float]
    """Of the forget rows, as the model is."""
    wanted: Mapping[str, float]
    """What they would be had the model never seen them."""

    @property
    def distance(self) -> float:
        """Mean distance between the two: their 1-Wasserstein distance, nats a token."""
        return statistics.fmean(abs(self.wanted[row] - loss) for row, loss in self.losses.items())

    @property
    def scale(self) -> float:
        """Mean of the wanted losses, nats a token."""
        return statistics.fmean(self.wanted.values())


def never_seen(
    members: Mapping[str, float],
    nonmembers: Mapping[str, float],
    groups: Mapping[str, Hashable],
) -> NeverSeen:
    """Compares two sets of losses by row id, rank by rank.

    Rows are compared inside their group (their task) where it has eight never-seen rows, as stories and
    biographies differ in loss; otherwise with all of them. `groups` holds the group of every row.
    """
    reference: dict[Hashable, list[float]] = defaultdict(list)
    for row, loss in nonmembers.items():
        reference[groups[row]].append(loss)
    own = {group for group, losses in reference.items() if len(losses) >= _ENOUGH}
    pools: dict[Hashable, list[str]] = defaultdict(list)
    for row in members:
        pools[groups[row] if groups[row] in own else None].append(row)
    wanted: dict[str, float] = {}
    for group, rows in pools.items():
        losses = list(nonmembers.values()) if group is None else reference[group]
        matched = matched_by_rank([members[row] for row in rows], losses)
        wanted |= dict(zip(rows, matched, strict=True))
    return NeverSeen(dict(members), wanted)
