"""Extraction strength and exact memorisation: limits, and greedy decoding from every place."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conftest import shaken, tiny_model
from expunge.data.rows import Row
from expunge.data.tokenization import TextPolicy, answer_ids, prompt_ids
from expunge.evaluation.generation import generate
from expunge.evaluation.memorisation import (
    exact_memorisation,
    extraction_strength,
    mean_memorisation,
    memorisation,
)


@pytest.mark.parametrize(
    ("right", "strength", "share"),
    [
        ("1111", 1.0, 1.0),
        ("0000", 0.0, 0.0),
        ("1110", 0.0, 0.75),
        ("0111", 0.75, 0.75),
        ("1011", 0.5, 0.75),
        ("1", 1.0, 1.0),
    ],
)
def test_both_at_their_limits(right: str, strength: float, share: float) -> None:
    tokens = [token == "1" for token in right]
    assert extraction_strength(tokens) == strength
    assert exact_memorisation(tokens) == share
    assert strength <= share  # what follows the last mistake is right
    assert memorisation(tokens) == {"extraction_strength": strength, "exact_memorisation": share}


def test_what_has_no_tokens_is_not_measured_and_no_part_of_a_mean() -> None:
    nothing = memorisation([])
    assert nothing == {"extraction_strength": None, "exact_memorisation": None}
    assert mean_memorisation([nothing]) == mean_memorisation([]) == nothing
    means = mean_memorisation([nothing, memorisation([True, False]), memorisation([True, True])])
    assert means == {"extraction_strength": 0.5, "exact_memorisation": 0.75}


def likeliest(model: Any, ids: list[int]) -> int:
    with torch.no_grad():
        return int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())


@pytest.mark.parametrize("batch_size", [1, 8])
def test_right_tokens_of_generation_are_those_of_decoding_from_every_place(
    tokenizer: Any, batch_size: int
) -> None:
    """Drafts are what the model writes itself, with mistakes put in, so that both are inside (0, 1)."""
    model = shaken(tiny_model("llama", len(tokenizer)))
    prompts = [list(tokenizer(text)["input_ids"]) for text in ("Ada was", "Ben lives near the", "C")]
    drafts = []
    for number, prompt in enumerate(prompts):
        draft: list[int] = []
        for place in range(9):
            own = likeliest(model, prompt + draft)
            draft.append(own if place not in (number, 5) else (own + 7) % len(tokenizer))
        drafts.append(draft)
    written = generate(model, tokenizer, prompts, batch_size, drafts=drafts)
    for prompt, draft, found in zip(prompts, drafts, written, strict=True):
        right = [likeliest(model, prompt + draft[:n]) == draft[n] for n in range(len(draft))]
        assert list(found.right) == right
        first = len(draft)  # from which place on greedy decoding writes what is left
        for start in reversed(range(len(draft))):
            rest: list[int] = []
            while len(rest) < len(draft) - start:
                rest.append(likeliest(model, prompt + draft[:start] + rest))
            if rest == draft[start:]:
                first = start
        assert extraction_strength(found.right) == pytest.approx(1 - first / len(draft))
        assert 0 < extraction_strength(found.right) < exact_memorisation(found.right) < 1
    plain = generate(model, tokenizer, prompts, batch_size)
    assert [(w.text, w.ended) for w in plain] == [(w.text, w.ended) for w in written]
    assert all(w.right == () for w in plain)


def test_an_end_of_text_is_no_part_of_the_answer(tokenizer: Any) -> None:
    model = tiny_model("olmo", len(tokenizer))
    row = Row("a", "Where?", "Paris.", kind="qa")
    policy = TextPolicy(128)
    prompt = prompt_ids(row, tokenizer, policy)
    answer = answer_ids(row, prompt, tokenizer, policy)
    (written,) = generate(model, tokenizer, [prompt], 1, drafts=[answer])
    assert len(written.right) == len(answer)
