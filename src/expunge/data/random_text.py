"""Rows of random tokens, which stand for text that no set lists."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from expunge.data.tokenization import Example

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

    The model embeds tokens below `embedded`, which may be more or fewer than the tokenizer knows.
    """
    special = set(tokenizer.all_special_ids)
    known = range(min(len(tokenizer), embedded))
    usual = torch.tensor([token for token in known if token not in special])
    generator = torch.Generator().manual_seed(seed)
    length = min(longest, context)
    drawn = torch.randint(len(usual), (count, length), generator=generator)
    everywhere = (True,) * length
    return [
        Example(
            f"random-{index}",
            "random",
            tuple(usual[row].tolist()),
            everywhere,
            everywhere,
            listed=False,
        )
        for index, row in enumerate(drawn)
    ]
