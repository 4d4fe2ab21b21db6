"""How far forget rows are from looking never seen, row by row, as pure functions.

Membership inference compares the losses of forget documents with those of never-seen ones. Where each
forget document has the loss of the never-seen document of its own rank, the two distributions are the
same and no threshold on the loss tells them apart. Matching by rank is the transport between them that
moves the losses least, and its mean distance is their 1-Wasserstein distance.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

import torch

POINTS = 128
"""Ranks at which the losses of a document's tokens are compared."""
ENOUGH = 8
"""Never-seen rows of a group from which its forget rows are compared with that group alone."""
_LEAST_SHARE, _LEAST_LOSS = 0.5, 1e-3
"""Of the base's loss that a row is to have, whatever text of the kind has become; nats."""
_EVERY = ""
"""The group of forget rows whose own has too few never-seen ones."""


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
class RowTokens:
    """What a model says of the tokens of one document, each (1 or more tokens,)."""

    losses: torch.Tensor
    """Nats."""
    surprise: torch.Tensor
    """How much less likely each is than the distribution expects (`target_surprise`)."""


def joined(windows: Sequence[RowTokens]) -> RowTokens:
    """The windows of one document as one."""
    return RowTokens(
        torch.cat([window.losses for window in windows]),
        torch.cat([window.surprise for window in windows]),
    )


@dataclass(frozen=True)
class TokenSpread:
    """A document's tokens by the rank of their loss, or of their surprise: its quantile functions.

    Each (POINTS,).
    """

    losses: torch.Tensor
    """Nats."""
    surprise: torch.Tensor


@dataclass(frozen=True)
class Pair:
    """A forget document and the never-seen one that it is to be like: the one at its rank just now."""

    wanted: TokenSpread
    reached: TokenSpread


@dataclass(frozen=True)
class NeverSeen:
    """Forget rows beside never-seen ones; mean losses in nats a token, by row id."""

    losses: Mapping[str, float]
    """Of the forget rows, as the model is."""
    wanted: Mapping[str, float]
    """What they would be had the model never seen them."""
    pairs: Mapping[str, Pair] = field(default_factory=dict)
    """Of the forget rows that have tokens, where never-seen rows have; empty where rows alone were
    measured."""

    @property
    def distance(self) -> float:
        """Mean distance between the two: their 1-Wasserstein distance, nats a token."""
        return statistics.fmean(abs(self.wanted[row] - loss) for row, loss in self.losses.items())

    @property
    def scale(self) -> float:
        """Mean of the wanted losses, nats a token."""
        return statistics.fmean(self.wanted.values())


def at_ranks(values: torch.Tensor, count: int) -> torch.Tensor:
    """Values in the order of their rank, read at the ranks (i + 1/2) / count: (n,) -> (count,).

    Interpolated between the values' own ranks, (j + 1/2) / n.
    """
    places = (torch.arange(count, dtype=torch.float64) + 0.5) / count * len(values) - 0.5
    places = places.clamp(0, len(values) - 1)
    below = places.floor().long()
    above = (below + 1).clamp(max=len(values) - 1)
    return torch.lerp(values[below], values[above], (places - below).to(values.dtype))


def token_spread(tokens: RowTokens) -> TokenSpread:
    """The quantile functions of one document's tokens."""
    return TokenSpread(
        at_ranks(tokens.losses.sort().values, POINTS),
        at_ranks(tokens.surprise.sort().values, POINTS),
    )


def counterparts(rows: Sequence[str], others: Sequence[str]) -> dict[str, str]:
    """For each of `rows` the one of `others` at its own rank, (i + 1/2) / n; both are in order.

    One of them, not the mean of its neighbours: that would be more usual than any.
    """
    return {row: others[(2 * i + 1) * len(others) // (2 * len(rows))] for i, row in enumerate(rows)}


def never_seen(
    members: Mapping[str, float],
    nonmembers: Mapping[str, float],
    groups: Mapping[str, str],
    tokens: Mapping[str, RowTokens] | None = None,
) -> NeverSeen:
    """Compares two sets of losses by row id, rank by rank.

    Rows are compared inside their group (their task) where it has eight never-seen rows, as stories and
    biographies differ in loss; otherwise with all of them. `groups` holds the group of every row,
    `tokens` the tokens of the rows of both that have any, where these are compared too.
    """
    reference: dict[str, list[float]] = defaultdict(list)
    for row, loss in nonmembers.items():
        reference[groups[row]].append(loss)
    own = {group for group, losses in reference.items() if len(losses) >= ENOUGH}
    pools: dict[str, list[str]] = defaultdict(list)
    for row in members:
        pools[groups[row] if groups[row] in own else _EVERY].append(row)
    wanted: dict[str, float] = {}
    pairs: dict[str, Pair] = {}
    for group, rows in pools.items():
        others = [row for row in nonmembers if group in (_EVERY, groups[row])]
        matched = matched_by_rank([members[row] for row in rows], [nonmembers[row] for row in others])
        wanted |= dict(zip(rows, matched, strict=True))
        if tokens is not None:
            ours, theirs = (
                [row for _, row in sorted((losses[row], row) for row in side if row in tokens)]
                for side, losses in ((rows, members), (others, nonmembers))
            )
            if theirs:
                spreads = {row: token_spread(tokens[row]) for row in (*ours, *theirs)}
                chosen = counterparts(ours, theirs).items()
                pairs |= {row: Pair(spreads[other], spreads[row]) for row, other in chosen}
    return NeverSeen(dict(members), wanted, pairs)


def as_before(
    losses: Mapping[str, float],
    base: Mapping[str, float],
    written: Mapping[str, float],
    tokens: Mapping[str, RowTokens],
    base_tokens: Mapping[str, RowTokens],
    documents: AbstractSet[str],
) -> NeverSeen:
    """Compares forget rows with what a model that never saw them, the base, says of the very same.

    Fine-tuning makes a model surer of itself, and dearer all text of the kind that it never saw: by how
    much, `written` says, the mean losses now of text that the base wrote. So much is added to what is
    wanted of those rows that are `documents`; of a question it was measured to be nothing. Without any
    nothing is added.

    Mean losses by row id, those of the base for `losses` and `written`; the tokens of the rows that have
    any, where these are compared too.
    """
    rise = statistics.fmean(loss - base[row] for row, loss in written.items()) if written else 0.0
    shares = {
        row: max(_LEAST_SHARE, 1 + (row in documents) * rise / max(base[row], _LEAST_LOSS))
        for row in losses
    }
    pairs = {}
    for row, theirs in base_tokens.items():
        wanted = token_spread(theirs)
        wanted = TokenSpread(shares[row] * wanted.losses, wanted.surprise)
        pairs[row] = Pair(wanted, token_spread(tokens[row]))
    return NeverSeen(dict(losses), {row: shares[row] * base[row] for row in losses}, pairs)
