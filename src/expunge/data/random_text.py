"""Rows of random tokens, which stand for text that no set lists."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from expunge.data.tokenization import Example, opening_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LENGTH = 64
"""Tokens a row."""


def random_examples(
    count: int,
    tokenizer: PreTrainedTokenizerBase,
    embedded: int,
    context: int,
    seed: int,
    longest: int = LENGTH,
) -> list[Example]:
    """`count` rows of tokens drawn evenly from the vocabulary, special ones left out.

    Each begins with what the tokenizer puts before any text (BOS), which does not count. The
    model embeds tokens below `embedded`, which may be more or fewer than the tokenizer knows.
    """
    special = set(tokenizer.all_special_ids)
    known = range(min(len(tokenizer), embedded))
    usual = torch.tensor([token for token in known if token not in special])
    generator = torch.Generator().manual_seed(seed)
    opening = opening_of(tokenizer)
    length = min(longest, context) - len(opening)
    drawn = torch.randint(len(usual), (count, length), generator=generator)
    counted = (False,) * len(opening) + (True,) * length
    return [
        Example(
            f"random-{index}",
            "random",
            (*opening, *usual[row].tolist()),
            counted,
            counted,
            listed=False,
        )
        for index, row in enumerate(drawn)
    ]
