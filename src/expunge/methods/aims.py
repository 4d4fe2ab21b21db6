"""What LIBU wants of every token of a calibrated forget row: the loss of never-seen text, rank by rank.

One ceiling for all tokens of a document gives it the mean loss of never-seen text and none of its
shape: never-seen documents hold tokens that any model foresees beside others that it cannot, and
min-k% (arXiv 2310.16789), which looks at the least likely fifth, tells the two apart at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from expunge.methods.calibration import NeverSeen, TokenSpread, at_ranks

_RANGE = (0.5, 1.25)
_LEAST = 1e-4
"""Nats; below, log-odds are a matter of rounding."""


@dataclass(frozen=True)
class Wanted:
    """Of some tokens, in nats, each (tokens,)."""

    losses: torch.Tensor
    entropy: torch.Tensor
    """Of the distribution that predicts it; NaN where nothing is known of it."""


class Aims:
    """The loss that every forget row should have, and how its tokens share it."""

    def __init__(self, ceiling: float, gain: float, *, match_tokens: bool) -> None:
        """`ceiling` is that of rows that are not calibrated, nats a token; `gain` how far an aim moves
        for each nat that is missed; without `match_tokens` all tokens of a row have one aim."""
        self._ceiling = ceiling
        self._gain = gain
        self._match_tokens = match_tokens
        self._ceilings: dict[str, float] = {}
        self._groups: dict[str, str] = {}
        self._losses: dict[str, torch.Tensor] = {}
        self._entropy: dict[str, torch.Tensor] = {}

    def calibrate(self, rows: NeverSeen) -> None:
        """Moves each aim by what was missed, and keeps it near what is wanted: one that is far off
        would go on pushing long after the losses have arrived."""
        if self._gain == 0:
            return
        for row, loss in rows.losses.items():
            wanted = rows.wanted[row]
            start = self._ceilings.get(row)
            moved = wanted if start is None else start + self._gain * (wanted - loss)
            self._ceilings[row] = min(max(moved, wanted * _RANGE[0]), wanted * _RANGE[1])
        if not self._match_tokens:
            return
        self._groups = {row: group for row, group in rows.groups.items() if group in rows.spreads}
        for group, spread in rows.spreads.items():
            self._losses[group] = self._moved(self._losses.get(group), spread)
            self._entropy[group] = spread.entropy

    def _moved(self, aim: torch.Tensor | None, spread: TokenSpread) -> torch.Tensor:
        if aim is None:
            return spread.wanted
        moved = aim + self._gain * (spread.wanted - spread.reached)
        near = moved.minimum(spread.wanted * _RANGE[1]).maximum(spread.wanted * _RANGE[0])
        return near.sort().values

    def of_row(self, row: str, losses: torch.Tensor) -> Wanted:
        """What the tokens of a row should have, whose `losses` (tokens,) the model has now.

        They keep their order: the least likely token is to be the least likely. Of equally likely ones
        the first in the text is to be the likeliest. Their mean is the row's ceiling.
        """
        ceiling = self._ceilings.get(row, self._ceiling)
        group = self._groups.get(row)
        if group is None or not len(losses):
            return Wanted(torch.full_like(losses, ceiling), torch.full_like(losses, torch.nan))
        ranks = losses.cpu().argsort(stable=True).argsort()
        wanted = at_ranks(self._losses[group], len(losses))
        wanted = wanted * (ceiling / wanted.mean().clamp(min=_LEAST))
        entropy = at_ranks(self._entropy[group], len(losses))
        return Wanted(wanted.clamp(min=_LEAST)[ranks].to(losses), entropy[ranks].to(losses))

    def state(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        return {
            "ceilings": dict(self._ceilings),
            "groups": dict(self._groups),
            "losses": {group: points.tolist() for group, points in self._losses.items()},
            "entropy": {g: points.tolist() for g, points in self._entropy.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Puts back what `state` gave."""
        self._ceilings = dict(state["ceilings"])
        self._groups = dict(state["groups"])
        self._losses = {g: torch.tensor(points) for g, points in state["losses"].items()}
        self._entropy = {g: torch.tensor(points) for g, points in state["entropy"].items()}
