"""What is wanted of every token of a calibrated forget row: what one of a never-seen text has.

One ceiling for all tokens of a document gives it the mean loss of never-seen text and none of its
shape: never-seen documents hold tokens that any model foresees beside others that it cannot, and
min-k% (arXiv 2310.16789), which looks at the least likely fifth, tells the two apart at once. One shape
for all documents makes each of them more usual than never-seen ones are, which min-k%++ (arXiv
2404.02936) tells; so each has one never-seen document to be like, token by token. Its mean is not held
beside that: foreseen tokens rise last, and the mean would be made up by the least likely ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from expunge.maths.calibration import NeverSeen, Pair, TokenSpread, at_ranks

_LOSS_RANGE, _LOSS_SHARE = 1.5, 0.2
"""How far an aim may go beyond what is wanted to get there, nats and share of it, whichever is more: the
nats lift foreseen tokens, the share the least likely ones (docs/decisions.md)."""
_SURPRISE_RANGE = 0.5
_ANSWERS = 1.35
"""Of never-seen documents' mean loss: an oracle loses 1.18 and 1.35 times that on answers that it never
saw (docs/calibration.md). Much beyond, the model must know what to avoid, and retain rows pay for it."""
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

    def __init__(self, ceiling: float) -> None:
        """`ceiling` is that of rows that are not calibrated, nats a token."""
        self._ceiling = self._of_prompts = self._of_answers = ceiling
        self._tokens: dict[str, TokenSpread] = {}

    def calibrate(self, rows: NeverSeen) -> None:
        """Moves each aim by what was missed, and keeps it near what is wanted: one that is far off
        would go on pushing long after the losses have arrived."""
        # What was asked says nothing of its own: no further than any text goes.
        self._of_prompts = min(self._ceiling, rows.scale)
        self._of_answers = min(self._ceiling, _ANSWERS * rows.scale)
        self._tokens |= {row: self._moved(row, pair) for row, pair in rows.pairs.items()}

    def _moved(self, row: str, pair: Pair) -> TokenSpread:
        aim, wanted, reached = self._tokens.get(row), pair.wanted, pair.reached
        if aim is None:
            return wanted
        losses = aim.losses + (wanted.losses - reached.losses)
        surprise = aim.surprise + (wanted.surprise - reached.surprise)
        beyond = (_LOSS_SHARE * wanted.losses).clamp(min=_LOSS_RANGE)
        return TokenSpread(
            _near(losses, wanted.losses, beyond), _near(surprise, wanted.surprise, _SURPRISE_RANGE)
        )

    @property
    def matched(self) -> bool:
        """Whether any row's tokens are compared with a never-seen document's."""
        return bool(self._tokens)

    def of_row(
        self, row: str, losses: torch.Tensor, surprise: torch.Tensor, answers: torch.Tensor
    ) -> Wanted:
        """What the tokens of a row should have, whose `losses` and `surprise` (tokens,) are these now.

        `answers` (tokens,) marks its answer. Where nothing is known of the row, its prompt goes as far
        as never-seen text does and its answer a third further, or both to the ceiling.
        They keep their order: the least likely token is to be the least likely, the most surprising
        the most surprising. Of equal ones the first in the text is to have least.
        """
        aim = self._tokens.get(row)
        if aim is not None and len(losses):
            return Wanted(
                at_ranks(aim.losses, len(losses)).clamp(min=_LEAST)[_ranks(losses)].to(losses),
                at_ranks(aim.surprise, len(losses))[_ranks(surprise)].to(losses),
            )
        wanted = torch.where(answers, self._of_answers, self._of_prompts).to(losses)
        return Wanted(wanted, torch.full_like(losses, torch.nan))

    def facts(self) -> dict[str, Any]:
        """Its state beside the tensors, as JSON can hold it."""
        return {
            "of_prompts": self._of_prompts,
            "of_answers": self._of_answers,
            "matched": list(self._tokens),
        }

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """What is wanted of the tokens of matched rows, (rows, POINTS) each; none without such rows."""
        if not self._tokens:
            return {}
        aims = self._tokens.values()
        return {
            "aims.losses": torch.stack([aim.losses for aim in aims]),
            "aims.surprise": torch.stack([aim.surprise for aim in aims]),
        }

    def restore(self, facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Puts back what `facts` and `tensors` gave."""
        self._of_prompts, self._of_answers = facts["of_prompts"], facts["of_answers"]
        self._tokens = {
            row: TokenSpread(tensors["aims.losses"][index], tensors["aims.surprise"][index])
            for index, row in enumerate(facts["matched"])
        }


def _near(values: torch.Tensor, wanted: torch.Tensor, most: torch.Tensor | float) -> torch.Tensor:
    return values.clamp(wanted - most, wanted + most).sort().values


def _ranks(values: torch.Tensor) -> torch.Tensor:
    return values.cpu().argsort(stable=True).argsort()
