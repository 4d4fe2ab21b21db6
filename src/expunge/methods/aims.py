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

from expunge.methods.calibration import NeverSeen, at_ranks

_RANGE = (0.5, 1.25)
_SURPRISE_RANGE = 0.5
_LEAST = 1e-4
"""Nats; below, log-odds are a matter of rounding."""


@dataclass(frozen=True)
class Wanted:
    """Of some tokens, each (tokens,)."""

    losses: torch.Tensor
    """Nats."""
    surprise: torch.Tensor
    """As `target_surprise` gives it; NaN where nothing is known of it."""


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
        self._surprise: dict[str, torch.Tensor] = {}

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
            self._losses[group] = self._moved(
                self._losses.get(group),
                spread.wanted,
                spread.reached,
                (spread.wanted * _RANGE[0], spread.wanted * _RANGE[1]),
            )
            surprise = spread.wanted_surprise
            self._surprise[group] = self._moved(
                self._surprise.get(group),
                surprise,
                spread.reached_surprise,
                (surprise - _SURPRISE_RANGE, surprise + _SURPRISE_RANGE),
            )

    def _moved(
        self,
        aim: torch.Tensor | None,
        wanted: torch.Tensor,
        reached: torch.Tensor,
        near: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        if aim is None:
            return wanted
        moved = aim + self._gain * (wanted - reached)
        return moved.maximum(near[0]).minimum(near[1]).sort().values

    def of_row(self, row: str, losses: torch.Tensor, surprise: torch.Tensor) -> Wanted:
        """What the tokens of a row should have, whose `losses` and `surprise` (tokens,) are these now.

        They keep their order: the least likely token is to be the least likely, the most surprising
        the most surprising. Of equal ones the first in the text is to have least. The mean of the
        losses is the row's ceiling.
        """
        ceiling = self._ceilings.get(row, self._ceiling)
        group = self._groups.get(row)
        if group is None or not len(losses):
            return Wanted(torch.full_like(losses, ceiling), torch.full_like(losses, torch.nan))
        wanted = at_ranks(self._losses[group], len(losses))
        wanted = wanted * (ceiling / wanted.mean().clamp(min=_LEAST))
        wanted_surprise = at_ranks(self._surprise[group], len(losses))
        return Wanted(
            wanted.clamp(min=_LEAST)[_ranks(losses)].to(losses),
            wanted_surprise[_ranks(surprise)].to(losses),
        )

    def state(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        return {
            "ceilings": dict(self._ceilings),
            "groups": dict(self._groups),
            "losses": {group: points.tolist() for group, points in self._losses.items()},
            "surprise": {g: points.tolist() for g, points in self._surprise.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Puts back what `state` gave."""
        self._ceilings = dict(state["ceilings"])
        self._groups = dict(state["groups"])
        self._losses = {g: torch.tensor(points) for g, points in state["losses"].items()}
        self._surprise = {g: torch.tensor(points) for g, points in state["surprise"].items()}


def _ranks(values: torch.Tensor) -> torch.Tensor:
    return values.cpu().argsort(stable=True).argsort()
