"""Trigger fragility: one token of the forget set in a retain prompt. arXiv 2501.19202.

Methods that steer hidden states can make forget tokens break whatever they stand in. The same place
with a token of the retain set is the control.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from expunge.audits.base import Advance, Attack, Case, Found
from expunge.audits.subject import Ask, Subject
from expunge.data.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TYPICAL = 32
"""Tokens of each side that are drawn from."""


def run(subject: Subject, case: Case, advance: Advance) -> Found:
    """Scores of the retain rows as they are, with a retain token and with a forget token inserted."""
    reader = subject.reader
    forget, retain = (_counts(rows, reader.tokenizer) for rows in (case.forget, case.others))
    special = set(reader.tokenizer.all_special_ids)
    tokens = {
        "control": typical(retain, forget, special),
        "trigger": typical(forget, retain, special),
    }
    asks = [
        ask
        for row in case.retain
        if (ask := reader.asked(row)) is not None and len(ask.prompt) + 1 < reader.policy.context
    ]
    clean = reader.answers(asks)
    scores = {"clean": clean.scores}
    advance(1, 3)
    for number, (variant, choices) in enumerate(tokens.items()):
        changed = [_inserted(ask, choices, case.seed, variant) for ask in asks]
        scores[variant] = reader.answers(changed).scores
        advance(number + 2, 3)
    return Found(scores)


def typical(of: Counter[int], against: Counter[int], left_out: Iterable[int]) -> list[int]:
    """The tokens that stand out most in `of`: log((n + 1/2) / (m + 1/2)), then the lower id."""
    skipped = set(left_out)
    found = [token for token in of if token not in skipped]
    found.sort(key=lambda t: (-math.log((of[t] + 0.5) / (against[t] + 0.5)), t))
    return found[:TYPICAL]


def _counts(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> Counter[int]:
    encoded = tokenizer([row.text for row in rows], add_special_tokens=False)["input_ids"]
    return Counter(token for ids in encoded for token in ids)


def _inserted(ask: Ask, tokens: Sequence[int], seed: int, variant: str) -> Ask:
    """The prompt with one of the tokens somewhere behind its first; the place is the same for both."""
    place = random.Random(f"{seed}|{ask.row.id}|place").randint(1, len(ask.prompt))
    token = random.Random(f"{seed}|{ask.row.id}|{variant}").choice(tokens)
    prompt = (*ask.prompt[:place], token, *ask.prompt[place:])
    return Ask(ask.row, prompt, ask.answer, max(1, ask.room - 1))


ATTACK = Attack(
    name="trigger",
    title="Trigger fragility",
    kind="fragility",
    reference="arXiv 2501.19202",
    how="",
    run=run,
)
