"""LongRoPE: a row's neighbours never decide by which factors it turns."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conftest import passes_of, random_examples, shaken
from expunge.audits.attacks.ablation import mean_states
from expunge.audits.subject import Reader
from expunge.data.batches import collate
from expunge.data.rows import Row
from expunge.data.tokenization import TextPolicy
from expunge.evaluation.choices import Greedy
from expunge.evaluation.decoding import Request, decode, stream
from expunge.evaluation.multiple_choice import choice_log_probs
from expunge.methods.forward import all_logits
from expunge.models.decoder import find_layout
from expunge.models.rope import keep_rows_apart, switch_of
from expunge.segments.segment import Segment

SWITCH = 24
LENGTHS = [5, SWITCH - 2, SWITCH, SWITCH + 1, 40, 12]


@pytest.fixture(scope="module")
def long_rope(tokenizer: Any) -> Any:
    """A tiny Phi-3 whose factors beyond 24 tokens differ much from those before."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "phi3",
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        original_max_position_embeddings=SWITCH,
        rope_scaling={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [9.0] * 4,
        },
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    config.dtype = torch.float32
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = shaken(AutoModelForCausalLM.from_config(config).eval())
    keep_rows_apart(model)
    keep_rows_apart(model)  # once more changes nothing
    assert switch_of(model.config) == SWITCH
    return model


def test_padded_rows_are_what_each_is_alone(long_rope: Any, tokenizer: Any) -> None:
    examples = random_examples(LENGTHS, len(tokenizer))
    batch = collate(examples, range(len(examples)), 1)
    with torch.no_grad():
        together = all_logits(long_rope, batch.input_ids, batch.attention_mask)
        packed = Segment(long_rope, find_layout(long_rope), 0, 1).from_ids(
            torch.cat([torch.tensor(e.input_ids) for e in examples]), LENGTHS
        )
        for row, example in enumerate(examples):
            ids = torch.tensor([example.input_ids])
            output = long_rope(input_ids=ids, output_hidden_states=False)
            # float32: a padded batch sums in another order.
            assert torch.allclose(together[row, : len(example)], output.logits[0], atol=1e-3)
            alone = Segment(long_rope, find_layout(long_rope), 0, 1).from_ids(ids[0], [len(example)])
            start = sum(LENGTHS[:row])
            assert torch.allclose(packed[start : start + len(example)], alone, atol=1e-3)
    losses = [passes_of(long_rope, size).losses(examples, "rows") for size in (1, 64)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def by_hand(model: Any, prompt: list[int], room: int) -> list[int]:
    """Greedy decoding without a cache: each token by the factors of the text before it."""
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + room and (ids == prompt or ids[-1] != 0):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 64])
def test_what_is_written_across_the_switch_does_not_depend_on_the_batch(
    long_rope: Any, tokenizer: Any, batch_size: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(2, len(tokenizer), (n,), generator=generator).tolist() for n in LENGTHS]
    right = [by_hand(long_rope, prompt, 30) for prompt in prompts]
    none: list[list[int]] = [[] for _ in prompts]
    for drafts in (none, right, [[*row[:7], 9] for row in right]):
        requests = [Request(p, d, 30) for p, d in zip(prompts, drafts, strict=True)]
        written = dict(decode(long_rope, requests, {0}, batch_size, Greedy()))
        assert [written[n] for n in range(len(prompts))] == right
        assert [list(stream(long_rope, r, {0}, Greedy())) for r in requests] == right


def test_questions_that_share_a_start_are_scored_as_alone(long_rope: Any, tokenizer: Any) -> None:
    start = "Ada was born in a small house near the river of Paris. "
    prompts = [start + f"{n}?" * times for n in range(100, 108) for times in (1, 9)]
    lengths = [len(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    assert min(lengths) < SWITCH < max(lengths)
    together = choice_log_probs(long_rope, tokenizer, prompts, 64)
    alone = [choice_log_probs(long_rope, tokenizer, [prompt], 1) for prompt in prompts]
    assert torch.allclose(together, torch.cat(alone), atol=1e-3)


def test_mean_states_do_not_depend_on_the_batch(long_rope: Any, tokenizer: Any) -> None:
    rows = [Row(f"a{n}", "Ada was born", "in Paris " * n) for n in (1, 4, 12)]
    layout = find_layout(long_rope)
    alone, together = (
        mean_states(Reader(long_rope, tokenizer, TextPolicy(128), size), layout, rows)
        for size in (1, 64)
    )
    assert torch.allclose(alone, together, atol=1e-3)
