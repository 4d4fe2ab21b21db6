"""Rows that the target writes: what it says itself, and never what is to be forgotten."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from expunge.data.random_text import random_examples
from expunge.data.tokenization import Example
from expunge.methods.base import Context
from expunge.methods.own_text import written_by

Contexts = Callable[..., Context]
Autocast = Callable[[], AbstractContextManager[Any]]


class Chain:
    """A model that gives one next token to every token: the one after it, round the vocabulary."""

    device = torch.device("cpu")

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def __call__(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        logits = torch.full((*input_ids.shape, self.vocabulary), -1e4)
        logits.scatter_(2, (input_ids[..., None] + 1) % self.vocabulary, 0.0)
        return CausalLMOutputWithPast(logits=logits)


def example(*ids: int, listed: bool = True) -> Example:
    everywhere = (True,) * len(ids)
    return Example(f"row {ids}", "task", ids, everywhere, everywhere, listed=listed)


def written(
    rows: list[Example], forget: list[Example], retain: list[Example], seed: int = 0
) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    model: Any = Chain(100)
    return written_by(model, rows, forget, retain, generator, nullcontext)


def test_behind_its_random_half_a_row_goes_on_as_the_model_writes() -> None:
    random = example(50, 3, 70, 5, *[0] * 4, listed=False)
    [row] = written([random], [], [])
    assert row.input_ids == (50, 3, 70, 5, 6, 7, 8, 9)
    assert row.token_mask == row.answer_mask == (True,) * 8
    assert not row.listed
    assert row.row_id == random.row_id


def test_it_writes_each_token_as_often_as_the_model_gives_it() -> None:
    chances = [0.0, 0.5, 0.0, 0.3, 0.2, 0.0]

    class Fixed(Chain):
        def __call__(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            logits = torch.tensor(chances).log().expand(*input_ids.shape, len(chances))
            return CausalLMOutputWithPast(logits=logits)

    model: Any = Fixed(len(chances))
    random = example(1, 1, 1, *[0] * 2, listed=False)
    rows = written_by(model, [random] * 2000, [], [], torch.Generator().manual_seed(0), nullcontext)
    drawn = [token for row in rows for token in row.input_ids[3:]]
    for token, chance in enumerate(chances):
        share = drawn.count(token) / len(drawn)
        # Four deviations of a share of 4,000 draws; what the model never gives is never drawn.
        assert abs(share - chance) <= 4 * (chance * (1 - chance) / len(drawn)) ** 0.5, token


def test_what_a_row_begins_with_counts_no_more_than_before() -> None:
    random = replace(example(1, 50, 3, 70, *[0] * 4), token_mask=(False, *[True] * 7))
    [row] = written([random], [example(71, 72, 73)], [])
    assert row.input_ids == (1, 50, 3, 70, 71, 72)
    assert row.token_mask == row.answer_mask == (False, *[True] * 5)


def test_a_row_ends_before_it_repeats_the_forget_set() -> None:
    random = example(5, *[0] * 19, listed=False)
    forget = [example(90, 7, 8, 9, 91)]
    [row] = written([random], forget, [])
    assert row.input_ids == (5, *[0] * 9, 1, 2, 3, 4, 5, 6, 7, 8)  # 7 and 8 alone tell nothing
    # What retained text has as well may stay.
    [row] = written([random], forget, [example(6, 7, 8, 9, 10)])
    assert row.input_ids == (5, *[0] * 9, *range(1, 11))
    # Nor may the random half hold it.
    [row] = written([example(7, 8, 9, *[0] * 17, listed=False)], forget, [])
    assert row.input_ids == (7, 8)


def test_rows_are_sampled_from_the_models_own_distribution(
    make_context: Contexts, tokenizer: Any
) -> None:
    """Their loss is the model's entropy: what greedy decoding or random tokens do not have."""
    context = make_context()
    torch.manual_seed(0)
    with torch.no_grad():
        context.model.lm_head.weight.mul_(15)  # a distribution that is neither flat nor certain
    random = random_examples(300, tokenizer, 10**6, 16, seed=0)
    generator = torch.Generator().manual_seed(1)
    rows = written_by(context.model, random, [], [], generator, nullcontext)
    ids = torch.tensor([row.input_ids for row in rows])
    with torch.no_grad():
        log_p = context.model(input_ids=ids).logits[:, 7:-1].log_softmax(-1)
    loss = -log_p.gather(2, ids[:, 8:, None]).mean()
    entropy = -(log_p.exp() * log_p).sum(-1).mean()
    assert 0.2 < float(entropy) < 0.9 * torch.tensor(len(tokenizer)).log()
    assert float(loss) == pytest.approx(float(entropy), rel=0.05)


def test_the_same_seed_writes_the_same(make_context: Contexts, tokenizer: Any) -> None:
    random = random_examples(5, tokenizer, 10**6, 16, seed=0)

    def once(seed: int) -> list[tuple[int, ...]]:
        generator = torch.Generator().manual_seed(seed)
        rows = written_by(make_context().model, random, [], [], generator, nullcontext)
        return [row.input_ids for row in rows]

    assert once(3) == once(3)
    assert once(3) != once(4)
