"""Batched greedy generation against a loop of one prompt and no cache."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import FAMILIES, refusal, shaken, tiny_model
from expunge.data.words import words
from expunge.evaluation import cache, choices, decoding, generation
from expunge.evaluation.choices import logits_alone
from expunge.evaluation.decoding import cache_serves
from expunge.evaluation.generation import cannot_become, generate
from expunge.models.loading import check_model, load_model

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


def texts(tokenizer: Any, rows: list[list[int]], *ends: int) -> list[str]:
    """What the rows say, without the end that stopped them."""
    said = [[token for token in row if token not in ends] for row in rows]
    return [tokenizer.decode(row, skip_special_tokens=True) for row in said]


def write(*arguments: Any, **options: Any) -> list[str]:
    return [written.text for written in generate(*arguments, **options)]


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
        written = write(model, tokenizer, asked, batch_size, counted.append)
        assert written == texts(tokenizer, alone, end)
        assert sum(counted) == len(asked)
        assert max(counted) <= batch_size


@pytest.mark.parametrize("names", ["tokenizer", "config", "generation_config"])
def test_a_text_ends_at_any_token_that_is_named_an_end(names: str, tokenizer: Any) -> None:
    """Often one of the three lists ends that the others lack, special tokens or not."""
    model = shaken(tiny_model("llama", len(tokenizer)))
    asked = prompts([4, 6], len(tokenizer))
    changed = copy.deepcopy(tokenizer)
    end = one_at_a_time(model, asked[0], -1)[2]
    if names == "tokenizer":
        changed.eos_token = changed.convert_ids_to_tokens(end)
    else:
        getattr(model, names).eos_token_id = [len(tokenizer) + 5, end]
    alone = [one_at_a_time(model, prompt, end) for prompt in asked]
    assert len(alone[0]) <= 3
    written = generate(model, changed, asked, 2)
    assert [each.text for each in written] == texts(changed, alone, end)
    assert [each.ended for each in written] == [row[-1] == end for row in alone]


def test_a_row_near_the_end_of_the_context_does_not_shorten_its_neighbours(tokenizer: Any) -> None:
    model = shaken(tiny_model("gpt2", len(tokenizer)))
    asked = prompts([30, 127, 20, 124], len(tokenizer))
    alone = [one_at_a_time(model, prompt, tokenizer.eos_token_id) for prompt in asked]
    assert list(map(len, alone)) == [NEW_TOKENS, 1, NEW_TOKENS, 4]
    assert write(model, tokenizer, asked, 64) == texts(tokenizer, alone)
    # So few of them end early that they stay in the batch, beyond the last position that there is.
    asked = [asked[3], *prompts([30] * 7, len(tokenizer))]
    alone = [one_at_a_time(model, prompt, tokenizer.eos_token_id) for prompt in asked]
    assert list(map(len, alone)) == [4, *[NEW_TOKENS] * 7]
    assert write(model, tokenizer, asked, 64) == texts(tokenizer, alone)


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
    assert write(model, tokenizer, asked, 2) == texts(tokenizer, alone)
    assert model.generation_config is own


def family_model(family: str, vocabulary: int) -> Any:
    """A tiny model; those that conftest does not make tell positions by other means."""
    if family not in ("opt", "bloom"):
        return tiny_model(family, vocabulary)
    config = AutoConfig.for_model(
        family,
        vocab_size=vocabulary,
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=32,
        num_hidden_layers=4,
        n_layer=4,
        n_head=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        eos_token_id=0,
        pad_token_id=1,
    )
    config.dtype = torch.float32
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def windowed(family: str, vocabulary: int) -> Any:
    """A model whose layers, or every other one, see the last four tokens only."""
    config = AutoConfig.for_model(
        family,
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=128,
        sliding_window=4,
        eos_token_id=0,
        pad_token_id=1,
    )
    config.dtype = torch.float32
    torch.manual_seed(0)
    return shaken(AutoModelForCausalLM.from_config(config).eval())


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_a_sliding_window_is_counted_in_each_rows_own_tokens(family: str, tokenizer: Any) -> None:
    model = windowed(family, len(tokenizer))
    asked = prompts([5, 23, 1, 5, 60, 12, 7], len(tokenizer))
    alone = [one_at_a_time(model, prompt, 0) for prompt in asked]
    drafts = [[*row[: 2 * place], 9] for place, row in enumerate(alone)]
    for batch_size in (1, 3, 64):
        assert write(model, tokenizer, asked, batch_size) == texts(tokenizer, alone)
        assert write(model, tokenizer, asked, batch_size, drafts=drafts) == texts(tokenizer, alone)


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2", "opt", "bloom"])
def test_no_draft_changes_what_is_written(family: str, tokenizer: Any) -> None:
    model = shaken(family_model(family, len(tokenizer)))
    asked = prompts([5, 23, 1, 5, 60, 12, 7], len(tokenizer))
    end = one_at_a_time(model, asked[1], -1)[3]
    model.generation_config.eos_token_id = [end]
    alone = [one_at_a_time(model, prompt, end) for prompt in asked]
    right = [row[:-1] if row[-1] == end else row for row in alone]
    kinds: dict[str, list[list[int]]] = {
        "right": right,
        "right, too long": [[*row, *([7] * 20)] for row in right],
        "half right": [[*row[: len(row) // 2], 8, *row] for row in right],
        "wrong": [[8, 9]] * len(asked),
        "empty": [[]] * len(asked),
        "the end": [[end]] * len(asked),
    }
    for drafts in kinds.values():
        for batch_size in (1, 64):
            written = write(model, tokenizer, asked, batch_size, drafts=drafts)
            assert written == texts(tokenizer, alone, end)


def test_a_right_draft_needs_no_step(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = shaken(tiny_model("olmo", len(tokenizer)))
    asked = prompts([5, 9, 30], len(tokenizer))
    alone = [one_at_a_time(model, prompt, 0) for prompt in asked]
    passes = []
    assert cache_serves(model)  # tried once a model
    model.register_forward_hook(lambda *_: passes.append(1))
    assert write(model, tokenizer, asked, 64, drafts=alone) == texts(tokenizer, alone)
    assert len(passes) == 1


def test_rows_that_end_at_once_and_rows_that_never_do(tokenizer: Any) -> None:
    model = shaken(tiny_model("llama", len(tokenizer)))
    asked = prompts([5, 9, 30, 31], len(tokenizer))
    first = one_at_a_time(model, asked[0], -1)[0]
    for ends in ([first], [len(tokenizer) + 5]):
        model.generation_config.eos_token_id = ends
        alone = [one_at_a_time(model, prompt, ends[0]) for prompt in asked]
        assert len(alone[0]) == (1 if ends == [first] else NEW_TOKENS)
        assert write(model, tokenizer, asked, 64) == texts(tokenizer, alone, *ends)


def test_many_rows_come_and_go(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows join a pool that others have left, and the cache is laid out anew when it is full."""
    monkeypatch.setattr(cache, "ROOM", 3)
    monkeypatch.setattr(decoding, "ROOM", 3)
    model = shaken(tiny_model("qwen2", len(tokenizer)))
    asked = prompts([1 + (7 * n) % 40 for n in range(40)], len(tokenizer))
    end = one_at_a_time(model, asked[3], -1)[1]
    model.generation_config.eos_token_id = end
    alone = [one_at_a_time(model, prompt, end) for prompt in asked]
    assert len(set(map(len, alone))) > 2
    for batch_size in (2, 8):
        assert write(model, tokenizer, asked, batch_size) == texts(tokenizer, alone, end)


def test_what_all_but_ties_is_decided_by_the_row_alone(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.tensor([[1.0, 9.0, 9.0 + 1e-6], [1.0, 9.0, 9.1], [-5.0, -5.0, -9.0]])
    tokens, near = choices.choices(logits)
    assert near == [True, False, True]
    assert tokens[1] == 2
    assert choices.choices(logits.bfloat16())[1] == [False] * 3

    model = shaken(tiny_model("gpt_neox", len(tokenizer)))
    asked = prompts([5, 23, 7], len(tokenizer))
    alone = [one_at_a_time(model, prompt, 0) for prompt in asked]
    # As if every choice were a tie, and the batch had decided each wrongly.
    monkeypatch.setattr(choices, "choices", lambda x: ([3] * len(x), [True] * len(x)))
    assert write(model, tokenizer, asked, 64) == texts(tokenizer, alone)
    assert write(model, tokenizer, asked, 64, drafts=alone) == texts(tokenizer, alone)


@pytest.mark.parametrize(
    "answer",
    ["Paris", "I don't know, do you?", "naïve café, 12.5 % é", "北京 is a city", "a  b\nc d e f"],
)
def test_no_beginning_of_an_answer_is_lost(answer: str, tokenizer: Any) -> None:
    for written in (answer, f" {answer}", answer.upper()):
        ids = tokenizer(written, add_special_tokens=False)["input_ids"]
        for count in range(1, len(ids) + 1):
            assert not cannot_become(words(answer), tokenizer, (), ids[:count])
    other = tokenizer(f"Certainly, madam, it is {answer}", add_special_tokens=False)["input_ids"]
    assert cannot_become(words(answer), tokenizer, (), other)
    # The right words first: whether an end follows is yet to be seen.
    more = tokenizer(f"{answer} and so on and on", add_special_tokens=False)["input_ids"]
    assert not cannot_become(words(answer), tokenizer, (), more)


def test_what_can_no_longer_be_exact_is_cut_off_and_scores_the_same(
    tokenizer: Any, memorised_dir: Path, forget_rows: list[dict[str, str]]
) -> None:
    model = load_model(check_model(str(memorised_dir)), "float32", "cpu")
    rows = sorted(forget_rows, key=lambda row: -len(row["output"]))[:3]
    asked = [tokenizer(row["input"])["input_ids"] for row in rows]
    whole = generate(model, tokenizer, asked, 2)
    exact = [whole[0].text, "some other answer of many words", None]
    for batch_size in (1, 3):
        cut = generate(model, tokenizer, asked, batch_size, exact=exact)
        assert [cut[0], cut[2]] == [whole[0], whole[2]]
        assert whole[1].text.startswith(cut[1].text)
        assert len(cut[1].text) < len(whole[1].text)
        assert not cut[1].ended


def test_nothing_asked_is_nothing_written(tokenizer: Any) -> None:
    assert generate(tiny_model("olmo", len(tokenizer)), tokenizer, [], 4) == []


def test_a_model_that_looks_ahead_is_refused() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 300}
    config = AutoConfig.for_model("bert", num_attention_heads=2, **sizes)
    model = shaken(AutoModelForCausalLM.from_config(config).eval())
    assert "bert: a token's logits depend on the tokens behind it" in refusal(
        lambda: cache_serves(model)
    )


def test_a_model_whose_rounding_is_coarse_is_causal_and_read_anew(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As tuning at a high rate leaves one: a batch of another shape gives other logits."""
    monkeypatch.setattr(decoding, "logits_alone", lambda *row: 1.1 * logits_alone(*row))
    assert not cache_serves(tiny_model("olmo", len(tokenizer)))


def test_a_recurrence_is_read_anew_for_every_token(tokenizer: Any) -> None:
    """What is in its state cannot be cut back to the end of a draft."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": len(tokenizer)}
    model = shaken(AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **sizes)).eval())
    assert not cache_serves(model)
    asked = prompts([5, 9, 12], len(tokenizer))
    requests = [decoding.Request(prompt, [7, 8], 6) for prompt in asked]
    for batch_size in (1, 3):
        found = dict(decoding.greedy(model, requests, (0,), batch_size))
        for index, prompt in enumerate(asked):
            written: list[int] = []
            while len(written) < 6 and written[-1:] != [0]:
                ids = torch.tensor([[*prompt, *written]])
                written.append(int(model(input_ids=ids, use_cache=False).logits[0, -1].argmax()))
            assert found[index] == written
