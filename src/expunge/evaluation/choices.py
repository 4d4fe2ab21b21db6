"""How the next token follows from the logits, and the pass of a row alone that decides a tie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from expunge.evaluation.batches import padded
from expunge.methods.forward import logits_at

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NEAR = 64
"""Two logits are as good as tied below this many units of rounding of the larger one (float32)."""

Place = tuple[int, int]
"""Which request a token is for, and how many new tokens it has before it."""


class Choice(Protocol):
    """How the next token follows from the logits; it must depend on them and the place alone."""

    def __call__(self, logits: torch.Tensor, places: Sequence[Place]) -> tuple[list[int], list[bool]]:
        """The token of each line of (lines, vocabulary), and whether rounding could have decided it."""

    def alone(self, logits: torch.Tensor, place: Place) -> int:
        """The token by the logits (vocabulary,) of a pass of the row alone, which decides."""


class Greedy:
    """The likeliest token."""

    def __call__(self, logits: torch.Tensor, places: Sequence[Place]) -> tuple[list[int], list[bool]]:
        """See `choices`."""
        return choices(logits)

    def alone(self, logits: torch.Tensor, place: Place) -> int:
        """The first of the likeliest."""
        return int(logits.argmax())


def choices(logits: torch.Tensor) -> tuple[list[int], list[bool]]:
    """The likeliest token of each line of (lines, vocabulary), and whether another all but ties it.

    A batch sums in another order than a row alone, so rounding must not decide. In half precision
    whole steps of the logits tie; there the first of the likeliest is taken and none is near.
    """
    if logits.dtype.itemsize < 4:
        return logits.argmax(-1).tolist(), [False] * len(logits)
    top = logits.topk(2)
    tokens: list[int] = top.indices[:, 0].tolist()
    bound = _NEAR * torch.finfo(logits.dtype).eps * top.values.abs().amax(1)
    near: list[bool] = (top.values[:, 0] - top.values[:, 1] <= bound).tolist()
    return tokens, near


def alone(model: PreTrainedModel, ids: Sequence[int]) -> int:
    """The likeliest next token by a pass of this row only: the same whatever batch it came from."""
    return int(logits_alone(model, ids)[0].argmax())


def logits_alone(model: PreTrainedModel, ids: Sequence[int]) -> torch.Tensor:
    """The logits after `ids` by a pass of this row only, (1, vocabulary)."""
    return logits_after(model, [ids])


@torch.no_grad()
def logits_after(model: PreTrainedModel, rows: Sequence[Sequence[int]], **inputs: Any) -> torch.Tensor:
    """The logits after each row, (rows, vocabulary), from one pass that takes `inputs` as well."""
    ids = padded(rows)
    where = torch.zeros(ids.shape, dtype=torch.bool)
    where[torch.arange(len(rows)), torch.tensor([len(row) - 1 for row in rows])] = True
    return logits_at(model, where, input_ids=ids.to(model.device), **{"use_cache": False, **inputs})
