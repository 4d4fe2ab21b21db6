"""Greedy continuations in batches, each the same as if it had been generated alone.

Protocol of SemEval-2025 Task 4: the prompt is `input` alone, greedy, at most 256 new tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from expunge.data.words import words
from expunge.errors import InputError
from expunge.models.kernels import fast_products
from expunge.models.text_forms import context_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_NEW_TOKENS = 256
_OPEN_WORDS = 2


class Written(NamedTuple):
    """One continuation, and whether it came to an end of text rather than to the limit of tokens."""

    text: str
    ended: bool
    right: tuple[bool, ...] = ()
    """Of each token of its draft, as far as there was room: whether it is the likeliest after prompt and
    draft before it. What a pass with the draft tells (teacher forcing), without one of its own."""


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    batch_size: int,
    advance: Callable[[int], None] = lambda _: None,
    drafts: Sequence[Sequence[int]] | None = None,
    longest: int | None = None,
    exact: Sequence[str | None] | None = None,
) -> list[Written]:
    """The continuation of each prompt (token ids), without special tokens; at most `longest` tokens.

    `drafts` are continuations worth a try, one a prompt: a good one saves time and no draft changes
    what is written. `exact` are the only answers that count, one a prompt or None: a continuation whose
    words cannot become those of its answer is cut off (`cannot_become`). The model's own generation
    settings play no part but for its ends of text. Raises InputError for a prompt that fills the
    context.
    """
    from expunge.evaluation.decoding import Request, greedy

    context = context_of(model.config)
    full = [number for number, prompt in enumerate(prompts, 1) if len(prompt) >= context]
    if full:
        raise InputError(
            f"row {full[0]}: its prompt fills the context of {context} tokens"
            f" ({len(full)} such rows); shorten it"
        )
    ends = ends_of(model, tokenizer)
    answers = [()] * len(prompts) if drafts is None else drafts
    requests = []
    for number, prompt in enumerate(prompts):
        room = min(longest or MAX_NEW_TOKENS, context - len(prompt))
        # Whoever is done stops: the draft of a right answer goes on to the end of text.
        draft = [] if drafts is None else [*answers[number], *ends[:1]][:room]
        wanted = words(exact[number] or "") if exact is not None else []
        lost = partial(cannot_become, wanted, tokenizer, ends) if wanted else None
        requests.append(Request(prompt, draft, room, [], lost))
    outputs: list[list[int]] = [[] for _ in prompts]
    with torch.no_grad(), fast_products(model.dtype, model.device):
        for index, tokens in greedy(model, requests, frozenset(ends), batch_size):
            outputs[index] = tokens
            advance(1)
    return [
        Written(
            text_of(tokens, tokenizer, ends),
            bool(tokens) and tokens[-1] in ends,
            tuple((request.right or ())[: len(answer)]),
        )
        for tokens, request, answer in zip(outputs, requests, answers, strict=True)
    ]


def cannot_become(
    wanted: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    ends: Container[int],
    tokens: Sequence[int],
) -> bool:
    """Whether the words of what `tokens` begin differ from `wanted`, whatever follows.

    The last two words are left out: the next token may go on with the last, and clean-up of blanks
    ("do n't") may join it to the one before.
    """
    said = words(text_of(tokens, tokenizer, ends))[:-_OPEN_WORDS]
    count = min(len(said), len(wanted))
    return said[:count] != [*wanted[:count]]


def ends_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a text: all that generation settings, configuration or tokenizer name."""
    named = (
        model.generation_config.eos_token_id,
        getattr(model.config.get_text_config(), "eos_token_id", None),
        tokenizer.eos_token_id,
    )
    ends = [end for of in named for end in ([of] if isinstance(of, int) else of or ())]
    return list(dict.fromkeys(ends))


def text_of(tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase, ends: Container[int]) -> str:
    """What new tokens say: without special ones, and without the end, which need not be special."""
    said = [token for token in tokens if token not in ends]
    return str(tokenizer.decode(said, skip_special_tokens=True))
