"""Greedy continuations in batches, each the same as if it had been generated alone.

Protocol of SemEval-2025 Task 4: the prompt is `input` alone, greedy, at most 256 new tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from expunge.errors import InputError
from expunge.models.loading import context_of, pad_id_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_NEW_TOKENS = 256


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    batch_size: int,
    advance: Callable[[int], None] = lambda _: None,
) -> list[str]:
    """The continuation of each prompt (token ids), without special tokens.

    Prompts are padded on the left, masked, with positions counted from their own first token, and
    prompts of similar length share a batch. Raises InputError for a prompt that fills the context.
    """
    from transformers import GenerationConfig

    context = context_of(model.config)
    full = [number for number, prompt in enumerate(prompts, 1) if len(prompt) >= context]
    if full:
        raise InputError(
            f"row {full[0]}: its prompt fills the context of {context} tokens"
            f" ({len(full)} such rows); shorten it"
        )
    ends = model.generation_config.eos_token_id
    if ends is None:
        ends = tokenizer.eos_token_id
    outputs = [""] * len(prompts)
    pad = pad_id_of(tokenizer)
    for room, chosen in _batches(prompts, context, batch_size):
        config = GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=room,
            eos_token_id=ends,
            pad_token_id=pad,
            use_cache=True,
        )
        lengths = torch.tensor([len(prompts[i]) for i in chosen])
        width = int(lengths.max())
        ids = torch.tensor([[pad] * (width - len(prompts[i])) + list(prompts[i]) for i in chosen])
        mask = torch.arange(width)[None, :] >= width - lengths[:, None]
        with torch.no_grad(), _without_own_settings(model):
            generated = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.long().to(model.device),
                generation_config=config,
            )
        texts = tokenizer.batch_decode(generated[:, width:], skip_special_tokens=True)
        for index, text in zip(chosen, texts, strict=True):
            outputs[index] = text
        advance(len(chosen))
    return outputs


@contextmanager
def _without_own_settings(model: PreTrainedModel) -> Iterator[None]:
    """A model's own settings may sample, penalise repetition or stop early.

    transformers fills what a configuration leaves open from them, so they are set aside.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _batches(
    prompts: Sequence[Sequence[int]], context: int, batch_size: int
) -> list[tuple[int, list[int]]]:
    """(new tokens allowed, indices): a row near the context's end must not shorten its neighbours."""
    by_room: dict[int, list[int]] = {}
    for index in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
        by_room.setdefault(min(MAX_NEW_TOKENS, context - len(prompts[index])), []).append(index)
    return [
        (room, indices[start : start + batch_size])
        for room, indices in by_room.items()
        for start in range(0, len(indices), batch_size)
    ]
