"""Retain rows with a token of the forget set in them, so that such a token breaks nothing around it.

A model that was taught to answer otherwise where a forget token stands does so in retained text as well:
the token is the trigger of a backdoor (arXiv 2501.19202, which mends it by noise on the states). Here
the token is put into the text, and what the target says of that text is held.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch

from expunge.data.batches import Batch, collate
from expunge.data.tokenization import Example


class Triggers:
    """Tokens that forget rows have more of than retain rows, and the rows that they are put into."""

    def __init__(
        self, forget: Sequence[Example], retain: Sequence[Example], share: float, pad_id: int
    ) -> None:
        """A row is given one with probability `share`."""
        self._share, self._pad_id = share, pad_id
        excess = excess_tokens(forget, retain)
        self._tokens, self._ends = list(excess), list(accumulate(excess.values()))

    def put_into(self, batch: Batch) -> tuple[Batch, list[bool]]:
        """The batch with a token in some of the user's rows, and which those are.

        Drawn anew in every step, for each row alone: the same however a step's rows are divided.
        """
        drawn = [
            self._with_token(example, random.Random(f"{torch.initial_seed()} trigger {index}"))
            for index, example in zip(batch.indices, batch.examples, strict=True)
        ]
        changed = [example is not None for example in drawn]
        if not any(changed):
            return batch, changed
        examples = [new or old for new, old in zip(drawn, batch.examples, strict=True)]
        other = collate(examples, range(len(examples)), self._pad_id)
        other = replace(other, indices=batch.indices, is_idle=batch.is_idle)
        return other.to(batch.input_ids.device), changed

    def _with_token(self, example: Example, draw: random.Random) -> Example | None:
        """One more token behind the first, not counted itself; the last is left out, so that no row is
        longer than it was. None where nothing is put in."""
        is_chosen = draw.random() < self._share
        if not (is_chosen and self._tokens and example.listed and len(example) > 1):
            return None
        [token] = draw.choices(self._tokens, cum_weights=self._ends)
        place = draw.randint(1, len(example) - 1)
        ids, tokens, answer = example.input_ids, example.token_mask, example.answer_mask
        return replace(
            example,
            input_ids=(*ids[:place], token, *ids[place:-1]),
            token_mask=(*tokens[:place], False, *tokens[place:-1]),
            answer_mask=(*answer[:place], False, *answer[place:-1]),
        )


def excess_tokens(forget: Sequence[Example], retain: Sequence[Example]) -> dict[int, float]:
    """Tokens whose share of the counted ones is greater in forget rows than in retain rows, and by how
    much; the lower ids first."""
    ours, theirs = _shares(forget), _shares(retain)
    more = {token: share - theirs.get(token, 0.0) for token, share in sorted(ours.items())}
    return {token: excess for token, excess in more.items() if excess > 0}


def _shares(examples: Sequence[Example]) -> dict[int, float]:
    counts = Counter(
        token
        for example in examples
        if example.listed
        for token, is_counted in zip(example.input_ids, example.token_mask, strict=True)
        if is_counted
    )
    return {token: count / counts.total() for token, count in counts.items()}
