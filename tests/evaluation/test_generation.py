"""Batched greedy generation against a loop of one prompt and no cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from conftest import FAMILIES, refusal, shaken, tiny_model
from expunge.evaluation import generation
from expunge.evaluation.generation import generate

NEW_TOKENS = 10


@pytest.fixture(autouse=True)
def _few_new_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    # The context of 128 then leaves room for prompts of many lengths in one batch.
    monkeypatch.setattr(generation, "MAX_NEW_TOKENS", NEW_TOKENS)


def prompts(lengths: list[int], vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, vocabulary, (n,), generator=generator).tolist() for n in lengths]


def one_at_a_time(model: Any, prompt: list[int], end: int) -> list[int]:
    """The new tokens of one prompt, without a cache."""
    ids = list(prompt)
    room = min(NEW_TOKENS, model.config.max_position_embeddings - len(prompt))
    with torch.no_grad():
        for _ in range(room):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == end:
                break
    return ids[len(prompt) :]


def texts(tokenizer: Any, rows: list[list[int]]) -> list[str]:
    return [tokenizer.decode(row, skip_special_tokens=True) for row in rows]


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_batches_of_any_size_write_what_one_prompt_alone_gets(family: str, tokenizer: Any) -> None:
    model = shaken(tiny_model(family, len(tokenizer)))
    asked = prompts([5, 23, 1, 5, 60, 12, 7], len(tokenizer))
    # An end that a row reaches in its midst, so that the rows of a batch stop apart.
    end = one_at_a_time(model, asked[1], -1)[3]
    model.generation_config.eos_token_id = [end]
    alone = [one_at_a_time(model, prompt, end) for prompt in asked]
    assert min(map(len, alone)) < max(map(len, alone))
    for batch_size in (1, 3, 64):
        counted: list[int] = []
        written = generate(model, tokenizer, asked, batch_size, counted.append)
        assert written == texts(tokenizer, alone)
        assert sum(counted) == len(asked)
        assert max(counted) <= batch_size


def test_the_tokenizers_end_counts_where_the_model_names_none(tokenizer: Any) -> None:
    model = shaken(tiny_model("llama", len(tokenizer)))
    model.generation_config.eos_token_id = None
    asked = prompts([4, 6], len(tokenizer))
    changed = copy.deepcopy(tokenizer)
    changed.eos_token = changed.convert_ids_to_tokens(one_at_a_time(model, asked[0], -1)[2])
    alone = [one_at_a_time(model, prompt, changed.eos_token_id) for prompt in asked]
    assert len(alone[0]) <= 3
    assert generate(model, changed, asked, 2) == texts(changed, alone)


def test_a_row_near_the_end_of_the_context_does_not_shorten_its_neighbours(tokenizer: Any) -> None:
    model = shaken(tiny_model("gpt2", len(tokenizer)))
    asked = prompts([30, 127, 20, 124], len(tokenizer))
    alone = [one_at_a_time(model, prompt, tokenizer.eos_token_id) for prompt in asked]
    assert list(map(len, alone)) == [NEW_TOKENS, 1, NEW_TOKENS, 4]
    assert generate(model, tokenizer, asked, 64) == texts(tokenizer, alone)


def test_a_prompt_that_fills_the_context_is_refused_by_number(tokenizer: Any) -> None:
    model = tiny_model("llama", len(tokenizer))
    asked = prompts([5, 128, 140], len(tokenizer))
    message = refusal(lambda: generate(model, tokenizer, asked, 2))
    assert message.startswith("row 2: its prompt fills the context of 128 tokens (2 such rows)")


def test_a_models_own_generation_settings_do_not_matter(tokenizer: Any) -> None:
    model = shaken(tiny_model("olmo", len(tokenizer)))
    asked = prompts([5, 9], len(tokenizer))
    alone = [one_at_a_time(model, prompt, tokenizer.eos_token_id) for prompt in asked]
    own = model.generation_config
    own.update(
        do_sample=True,
        temperature=5.0,
        top_k=3,
        num_beams=3,
        repetition_penalty=9.0,
        no_repeat_ngram_size=1,
        min_new_tokens=9,
        max_length=7,
        suppress_tokens=alone[0][:1],
        forced_eos_token_id=5,
        bad_words_ids=[[7]],
    )
    assert generate(model, tokenizer, asked, 2) == texts(tokenizer, alone)
    assert model.generation_config is own


def test_they_are_put_back_after_an_error(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("olmo", len(tokenizer))
    own = model.generation_config

    def fail(**_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(ZeroDivisionError):
        generate(model, tokenizer, [[5]], 1)
    assert model.generation_config is own
