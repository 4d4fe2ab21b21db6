"""Text that the target writes itself, which stands for all that no set lists.

What a model can do beside the user's rows shows in what it writes; the training data is not at hand. So
rows are sampled from the target behind random tokens (data-free distillation, as arXiv 2305.17888 has
it for quantisation), and what it says of them is held: of the random half, where it is undecided, and of
its own, where it is at home. A row ends before it repeats the forget set: that must not be held.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from expunge.data.tokenization import Example

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

_GRAM = 3
"""Tokens in a row that tell a forget row, if no retain row has them."""
_ROWS = 128
"""Of one pass, which takes hardly longer with more."""
_BEGUN, _ASTRAY, _COUNTED = 6, 16, 80
"""Tokens of a row's beginning, of what is written behind it before it counts, and of what counts."""
_WRITTEN = 32
"""Rows, of as many documents."""


@torch.no_grad()
def written_by(
    model: PreTrainedModel,
    examples: Sequence[Example],
    forget: Iterable[Example],
    retain: Iterable[Example],
    generator: torch.Generator,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> list[Example]:
    """Each example's first half and what `model` writes behind it, sampled at temperature 1.

    All are of one length; one is shorter where it would go on with the last of three tokens that a
    forget row has in a row and no retain row has.
    """
    told = _grams(forget) - _grams(retain)
    found = []
    for start in range(0, len(examples), _ROWS):
        some = examples[start : start + _ROWS]
        length = len(some[0])
        begun = torch.tensor([example.input_ids[: (length + 1) // 2] for example in some])
        with autocast():
            texts = _sampled(model, begun, length, generator).tolist()
        found += [
            _as_far_as(example, tuple(text), told) for example, text in zip(some, texts, strict=True)
        ]
    return found


@torch.no_grad()
def text_of_kind(
    model: PreTrainedModel,
    examples: Sequence[Example],
    generator: torch.Generator,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> list[Example]:
    """What `model` writes behind the first tokens of rows of different documents, first ones first.

    Beginnings and the next tokens are not counted: a model that knows the document by heart expects
    it to go on as it did.
    """
    rows = {example.document: example for example in reversed(examples)}
    begun = [example.input_ids[:_BEGUN] for example in reversed(rows.values())][:_WRITTEN]
    shortest = min(map(len, begun))
    with autocast():
        ids = torch.tensor([each[:shortest] for each in begun])
        texts = _sampled(model, ids, shortest + _ASTRAY + _COUNTED, generator).tolist()
    counted = (False,) * (shortest + _ASTRAY) + (True,) * _COUNTED
    return [
        Example(f"written by the base {n}", "", tuple(text), counted, counted, listed=False)
        for n, text in enumerate(texts)
    ]


def _sampled(
    model: PreTrainedModel, ids: torch.Tensor, length: int, generator: torch.Generator
) -> torch.Tensor:
    """(rows, tokens) -> (rows, length). Drawn on the CPU, so that a GPU draws as a processor does; by
    sums of probabilities, in less than half of the time of `torch.multinomial`."""
    past: dict[str, Any] = {}
    now = ids
    while ids.shape[1] < length:
        output = model(input_ids=now.to(model.device), use_cache=True, **past)
        sums = output.logits[:, -1].float().softmax(-1).cpu().double().cumsum(-1)
        drawn = torch.rand(len(sums), 1, generator=generator, dtype=sums.dtype) * sums[:, -1:]
        now = torch.searchsorted(sums, drawn, right=True).clamp(max=sums.shape[1] - 1)
        ids = torch.cat([ids, now], 1)
        kept = output.get("past_key_values")
        # Some families have no keys and values, and read everything anew.
        past, now = ({}, ids) if kept is None else ({"past_key_values": kept}, now)
    return ids


def _as_far_as(example: Example, ids: tuple[int, ...], told: set[tuple[int, ...]]) -> Example:
    end = next((place for place, gram in enumerate(_in_a_row(ids)) if gram in told), None)
    ids = ids if end is None else ids[: end + _GRAM - 1]
    counted = example.token_mask[: len(ids)]
    return replace(example, input_ids=ids, token_mask=counted, answer_mask=counted)


def _grams(examples: Iterable[Example]) -> set[tuple[int, ...]]:
    return {gram for example in examples for gram in _in_a_row(example.input_ids)}


def _in_a_row(ids: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    return (ids[place : place + _GRAM] for place in range(len(ids) - _GRAM + 1))
