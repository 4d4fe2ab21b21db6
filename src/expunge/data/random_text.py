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
    count: int, tokenizer: PreTrainedTokenizerBase, context: int, seed: int
) -> list[Example]:
    """`count` rows of tokens drawn evenly from the vocabulary, special ones left out."""
    special = set(tokenizer.all_special_ids)
    usual = torch.tensor([token for token in range(len(tokenizer)) if token not in special])
    generator = torch.Generator().manual_seed(seed)
    length = min(LENGTH, context)
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
