"""The rows that a choice of layer reads, and the same rows with corrupted prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from expunge.data.tokenization import Example

ROWS = 24
"""Rows that are read of each side."""
ANSWER_TOKENS = 8
"""Tokens of an answer that are read; later ones can be guessed from these, which the row shows."""


@dataclass(frozen=True, repr=False)
class SampledRow:
    """A row as far as it is read."""

    ids: tuple[int, ...]
    places: tuple[int, ...]
    """Places whose states predict an answer token: the token after each."""
    prompt: tuple[int, ...]
    """Places of tokens that are exchanged to corrupt the row; all before the first answer token."""

    @property
    def targets(self) -> list[int]:
        """The answer tokens that are predicted."""
        return [self.ids[place + 1] for place in self.places]


def _row(example: Example) -> SampledRow | None:
    """Text without a prompt is split in its middle; None for rows of which nothing can be asked."""
    answer = [t for t in range(1, len(example)) if example.answer_mask[t]]
    prompt = [t for t in range(answer[0] if answer else 0) if example.token_mask[t]]
    if not prompt:
        middle = len(example) // 2
        answer = [t for t in answer if t >= middle]
        prompt = [t for t in range(middle) if example.token_mask[t]]
    if not answer or not prompt:
        return None
    answer = answer[:ANSWER_TOKENS]
    return SampledRow(example.input_ids[: answer[-1] + 1], tuple(t - 1 for t in answer), tuple(prompt))


def sampled(examples: Sequence[Example], generator: torch.Generator) -> list[SampledRow]:
    """Up to ROWS rows, as many of every task and kind as there are; of a long row the first window."""
    groups: dict[tuple[str, str], list[SampledRow]] = {}
    seen: set[str] = set()
    for example in examples:
        if not example.listed or example.row_id in seen:
            continue
        seen.add(example.row_id)
        row = _row(example)
        if row is not None:
            groups.setdefault((example.task, example.kind), []).append(row)
    shuffled = []
    for key in sorted(groups):
        order = torch.randperm(len(groups[key]), generator=generator).tolist()
        shuffled.append([groups[key][index] for index in order])
    turns = range(max(map(len, shuffled), default=0))
    dealt = [group[turn] for turn in turns for group in shuffled if turn < len(group)]
    return dealt[:ROWS]


def corrupted_ids(rows: Sequence[SampledRow], generator: torch.Generator) -> list[tuple[int, ...]]:
    """Every row's ids with the prompt's tokens exchanged for others of all sampled prompts."""
    pool = [row.ids[place] for row in rows for place in row.prompt]
    exchanged = []
    for row in rows:
        drawn = torch.randint(len(pool), (len(row.prompt),), generator=generator).tolist()
        ids = list(row.ids)
        for place, index in zip(row.prompt, drawn, strict=True):
            ids[place] = pool[index]
        exchanged.append(tuple(ids))
    return exchanged
