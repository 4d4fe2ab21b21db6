"""Retain rows with a token of the forget set in them, so that such a token breaks nothing around it.

A model that was taught to answer otherwise where a forget token stands does so in retained text as well:
the token is the trigger of a backdoor (arXiv 2501.19202, which mends it by noise on the states). Here
the token is put into the text, and what the target says of that text is held.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch

from expunge.data.batches import Batch, collate
from expunge.data.tokenization import Example


class Triggers:
    """Tokens that tell forget rows from retain rows, and the rows that they are put into."""

    def __init__(
        self, forget: Sequence[Example], retain: Sequence[Example], share: float, pad_id: int
    ) -> None:
        """A row is given one with probability `share`."""
        self.share, self._pad_id = share, pad_id
        self._longest = max(map(len, retain), default=0)
        weights = telling_tokens(forget, retain) if share > 0 else {}
        self._tokens, self._ends = list(weights), list(accumulate(weights.values()))

    @property
    def count(self) -> int:
        """How many tokens are drawn from."""
        return len(self._tokens)

    def put_into(self, batch: Batch) -> tuple[Batch, list[bool]]:
        """The batch with a token in some of the user's rows, and which those are.

        Drawn anew in every step, for each row alone: the same however a step's rows are divided.
        """
        if not self._tokens:
            return batch, [False] * len(batch.examples)
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
        """One more token behind the first and before the last; None where nothing is put in.

        Neither it is counted nor the token behind it: what the target expects there can be what
        follows the token in forget text. A row as long as the longest loses its last token, so that
        no batch is larger than was planned for.
        """
        is_chosen = draw.random() < self.share
        if not (is_chosen and example.listed and len(example) > 1):
            return None
        [token] = draw.choices(self._tokens, cum_weights=self._ends)
        place = draw.randint(1, len(example) - 1)

        def masked(mask: tuple[bool, ...]) -> tuple[bool, ...]:
            return (*mask[:place], False, False, *mask[place + 1 :])[: self._longest]

        ids = example.input_ids
        return replace(
            example,
            input_ids=(*ids[:place], token, *ids[place:])[: self._longest],
            token_mask=masked(example.token_mask),
            answer_mask=masked(example.answer_mask),
        )


def telling_tokens(forget: Sequence[Example], retain: Sequence[Example]) -> dict[int, float]:
    """Tokens that a greater share of forget rows has than of retain rows, with what they tell.

    f log(f / r) of the shares f and r of rows, half a row added to each count: a token's part of how
    far the two kinds of rows are apart (Kullback-Leibler). Of shares of rows, not of tokens, so that
    what every row has (the end of text, a chat template's words) tells nothing. The lower ids first.
    """
    ours, theirs = _rows_with(forget), _rows_with(retain)
    rows, others = (sum(example.listed for example in side) + 1 for side in (forget, retain))
    weights = {}
    for token, count in sorted(ours.items()):
        share = (count + 0.5) / rows
        other = (theirs[token] + 0.5) / others
        if share > other:
            weights[token] = share * math.log(share / other)
    return weights


def _rows_with(examples: Sequence[Example]) -> Counter[int]:
    """In how many of the user's rows each token is counted."""
    return Counter(
        token
        for example in examples
        if example.listed
        for token in {t for t, on in zip(example.input_ids, example.token_mask, strict=True) if on}
    )
