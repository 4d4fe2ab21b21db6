"""What the methods that prefer another output share: refusals, other answers, DPO and a retain term."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from expunge.data.batches import Batch, collate
from expunge.data.rows import Row
from expunge.data.tokenization import Example, TextPolicy, encode_rows
from expunge.data.words import words
from expunge.errors import InputError
from expunge.maths.losses import dpo
from expunge.maths.numerics import row_sums
from expunge.methods.base import Context, Terms
from expunge.methods.counterfactuals import other_answers
from expunge.methods.gradient import GradientObjective, GradientSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REFUSAL = "I don't know."
ALTERNATIVES = "alternatives"
"""In the place of a sentence: every question has another answer, of the same form."""


def refusing(rows: Sequence[Row], refusal: str) -> list[Row]:
    """The rows with the refusal as their output."""
    return [replace(row, output=refusal) for row in rows]


def answered_instead(answer: str, forget: Sequence[Row], retain: Sequence[Row], seed: int) -> list[Row]:
    """The questions of the forget rows with `answer` as their output, or with `ALTERNATIVES`.

    Raises InputError where there is none, for a sentence that tells a forgotten answer, and where a
    question has no alternative.
    """
    option = "--method.answer-instead"
    questions = [row for row in forget if row.kind == "qa"]
    if not questions:
        raise InputError(f"{option}: the forget rows have no question with an answer; leave it out")
    if answer != ALTERNATIVES:
        said = f" {' '.join(words(answer))} "
        for row in questions:
            if f" {' '.join(words(row.output))} " in said:
                raise InputError(f"{option}: tells the answer of row {row.id!r}; give another sentence")
        return refusing(questions, answer)
    if not retain:
        raise InputError(
            f"{option} {answer}: they are made of words of the retain set; give --retain, or a sentence"
        )
    found = [row for row in other_answers(forget, retain, seed) if row.kind == "qa"]
    for row, other in zip(questions, found, strict=True):
        if words(row.output) == words(other.output):
            raise InputError(
                f"{option} {answer}: row {row.id!r} has no name, number or rare word to exchange;"
                f" give a sentence, such as {REFUSAL!r}"
            )
    return found


def encode_beside(
    examples: Sequence[Example],
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    policy: TextPolicy,
) -> list[Example]:
    """For each example the tokens of the row of its id, with EOS; none where there are no rows.

    An example that no row stands for is given itself. Of rows cut into windows the first go with the
    first. The last goes with the last: it alone is sure to have the end of the output. Raises InputError
    as `encode_rows` does, but for long rows.
    """
    windowed = replace(policy, long_rows="window")  # other words may be more tokens
    windows = defaultdict(list)
    for example in encode_rows(rows, tokenizer, windowed, eos=True):
        windows[example.row_id].append(example)
    found, taken = [], Counter[str]()
    counts = Counter(example.row_id for example in examples)
    for example in examples if rows else []:
        row = example.row_id
        if row not in windows:
            found.append(example)
            continue
        taken[row] += 1
        place = -1 if taken[row] == counts[row] else min(taken[row], len(windows[row])) - 1
        found.append(windows[row][place])
    return found


@dataclass(frozen=True)
class RefusalSettings(GradientSettings):
    """Settings of methods that put a refusal in the place of every forget row's output."""

    refusal: str = REFUSAL
    """What is to be said in the place of every forget row's output."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.refusal.strip():
            raise InputError(f"--method.refusal: is empty; write for example {REFUSAL!r}")

    def preferred(self, forget: Sequence[Row], retain: Sequence[Row], seed: int) -> Sequence[Row]:
        """The refusal after each row's input."""
        return refusing(forget, self.refusal)


@dataclass(frozen=True)
class PreferenceSettings(GradientSettings):
    """Settings of methods that prefer another output, by DPO.

    `tokens` is for retain text. Of forget rows the content counts: of questions the answer, of
    continuations all, for what both sides have in common leaves no trace in their difference.
    """

    beta: float = 0.1
    """Sharpness of the sigmoid."""
    retain_weight: float = 1.0
    """Weight of the retain term."""

    def start(self, context: Context) -> PreferenceObjective:
        """Makes the weights trainable and scores both outputs of every forget row as reference."""
        return PreferenceObjective(self, context)


class PreferenceObjective(GradientObjective):
    """DPO at work on one model, which is its own reference before the first step."""

    def __init__(self, settings: PreferenceSettings, context: Context) -> None:
        super().__init__(settings, context)
        self._beta, self._weight = settings.beta, settings.retain_weight
        self._preferred, self._pad_id = context.preferred, context.pad_id
        self._reference = [
            self.log_probs_before(context, rows, "reference", "content")[:, 0]
            for rows in (context.preferred, context.forget)
        ]

    def forget_size(self, batch: Batch) -> int:
        """The forget term is a mean over rows."""
        return len(batch.examples)

    def loss(self, forget: Batch, retain: Batch | None) -> Terms:
        """Both terms of L."""
        preferred = collate(self._preferred, forget.indices, self._pad_id)
        sides = (preferred.to(forget.input_ids.device), forget)
        gained, lost = (
            self._log_prob(batch) - reference[list(forget.indices)]
            for batch, reference in zip(sides, self._reference, strict=True)
        )
        return self.with_retain(dpo(gained, lost, self._beta), retain, self._weight)

    def _log_prob(self, batch: Batch) -> torch.Tensor:
        """Summed log-probability of each row's content: (rows,)."""
        return row_sums(*self.log_probs(batch, "content"))
