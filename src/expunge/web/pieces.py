"""An answer's tokens as pieces of readable text, each with its probability and its step of colour."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from expunge.web.asking import Answer, Token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BOUNDS = (0.01, 0.1, 0.5, 0.9)
"""Probabilities at which the next step of colour begins; step 0 is the least likely."""
STEPS = ("below 0.01", "0.01 to 0.1", "0.1 to 0.5", "0.5 to 0.9", "0.9 and more")
"""What the legend calls the steps."""
_UNFINISHED = "\ufffd"


@dataclass(frozen=True)
class Piece:
    """One token, or several that make up one character."""

    text: str
    probability: float
    """The product over its tokens."""
    tokens: int = 1
    special: bool = False
    """A token that is no text, such as the end of text; `text` is its name."""

    @property
    def step(self) -> int:
        """Its step of colour, 0 to 4."""
        return step_of(self.probability)

    @property
    def told(self) -> str:
        """The probability in words, for those who see no colour."""
        count = f", {self.tokens} tokens" if self.tokens > 1 else ""
        return f"probability {written(self.probability)}{count}"


def step_of(probability: float) -> int:
    """How many bounds the probability reaches."""
    return sum(probability >= bound for bound in BOUNDS)


def written(probability: float) -> str:
    """Three decimals; what would read as 0 or 1 and is neither is said to be below or above."""
    if 0 < probability < 0.0005:
        return "below 0.001"
    if 0.9995 <= probability < 1:
        return "above 0.999"
    return f"{probability:.3f}"


def pieces_of(answer: Answer, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """The pieces in order; without the special ones their texts make up the decoded answer.

    A byte-level token may hold half a character; it waits for the other half, and the last one of an
    unfinished answer is left out until it is known.
    """
    special = set(tokenizer.all_special_ids)
    pieces: list[Piece] = []
    ids: list[int] = []
    shown = ""
    waiting: list[Token] = []
    for token in answer.tokens:
        if token.id in special:
            name = str(tokenizer.convert_ids_to_tokens(token.id))
            pieces.append(Piece(name, token.probability, special=True))
            continue
        ids.append(token.id)
        waiting.append(token)
        whole = _decoded(ids, tokenizer)
        if whole.endswith(_UNFINISHED):
            continue
        pieces.append(_piece(whole[len(shown) :], waiting))
        shown, waiting = whole, []
    if waiting and answer.ending != "writing":
        pieces.append(_piece(_decoded(ids, tokenizer)[len(shown) :], waiting))
    return pieces


def typical_probability(answer: Answer) -> float | None:
    """The geometric mean of the tokens' probabilities; None of no token."""
    if not answer.tokens:
        return None
    if any(token.probability <= 0 for token in answer.tokens):
        return 0.0
    logs = [math.log(token.probability) for token in answer.tokens]
    return math.exp(math.fsum(logs) / len(logs))


def first_difference(one: Answer, other: Answer) -> int | None:
    """From 1 the first token at which two finished answers part; None where they are the same."""
    if one.ids == other.ids:
        return None
    pairs = zip(one.ids, other.ids, strict=False)
    same = next((n for n, (a, b) in enumerate(pairs) if a != b), None)
    return 1 + (min(len(one.ids), len(other.ids)) if same is None else same)


def _decoded(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    # Tidied spaces would change text that has been shown already.
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _piece(text: str, tokens: list[Token]) -> Piece:
    return Piece(text, math.prod(token.probability for token in tokens), len(tokens))
