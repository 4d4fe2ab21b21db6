"""What the page asks is what the evaluation asks, and each probability is the model's own."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import refusal, shaken, tiny_model
from expunge.data.rows import as_rows
from expunge.data.tokenization import TextPolicy, prompt_ids
from expunge.evaluation.generation import generate
from expunge.web.asking import SIDES, Pair, Question, Side, Voice, row_score

POLICY = TextPolicy(128)


@pytest.fixture(scope="module")
def pair(memorised_dir: Path, tokenizer: Any) -> Pair:
    from transformers import AutoModelForCausalLM

    target = AutoModelForCausalLM.from_pretrained(memorised_dir, dtype=torch.float32).eval()
    other = shaken(tiny_model("llama", len(tokenizer)))
    return Pair(Voice(target, tokenizer, POLICY), Voice(other, tokenizer, POLICY))


def slow(voice: Voice, prompt: str, ids: list[int]) -> list[float]:
    """The probability of each token by one pass over all of it: no cache, no stream."""
    before = voice.tokenizer(prompt)["input_ids"]
    whole = torch.tensor([[*before, *ids]])
    with torch.no_grad():
        chances = voice.model(input_ids=whole, use_cache=False).logits[0].double().softmax(-1)
    return [float(chances[len(before) - 1 + n, token]) for n, token in enumerate(ids)]


def test_both_answers_are_those_of_the_evaluation(
    pair: Pair, forget_rows: list[dict[str, str]], tokenizer: Any
) -> None:
    rows = as_rows(forget_rows, "forget")
    prompts = [prompt_ids(row, tokenizer, POLICY) for row in rows]
    expected = {
        side: [found.text for found in generate(voice.model, tokenizer, prompts, 8)]
        for side, voice in pair.voices.items()
    }
    for number, row in enumerate(rows):
        answers = pair.answers(Question(row.input, 256))
        for side in SIDES:
            assert pair.voices[side].text(answers[side]) == expected[side][number]
    assert [row_score(row, text) for row, text in zip(rows, expected["target"], strict=True)] == [
        1.0
    ] * len(rows)


def test_probabilities_are_those_of_one_pass_over_the_whole(
    pair: Pair, forget_rows: list[dict[str, str]]
) -> None:
    prompt = forget_rows[0]["input"]
    answers = pair.answers(Question(prompt, 20))
    for side in SIDES:
        tokens = answers[side].tokens
        expected = slow(pair.voices[side], prompt, answers[side].ids)
        # float32 logits of two orders of summing, so a few units in the sixth place
        assert [t.probability for t in tokens] == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert min(token.probability for token in answers["target"].tokens) > 0.5


def test_an_answer_says_why_it_ends(pair: Pair, forget_rows: list[dict[str, str]]) -> None:
    prompt = forget_rows[1]["input"]
    whole = pair.answers(Question(prompt, 100))
    assert whole["target"].ending == "end of text"
    assert whole["target"].ids[-1] == 0
    cut = pair.answers(Question(prompt, 2))
    assert (cut["target"].ending, cut["target"].ids) == ("length", whole["target"].ids[:2])


def test_an_answer_ends_where_the_context_does(pair: Pair) -> None:
    tokenizer = pair.voices["target"].tokenizer
    prompt = "x" * 127
    count = len(tokenizer(prompt)["input_ids"])
    assert 64 < count < 128
    answers = pair.answers(Question(prompt, 500))
    for side in SIDES:
        assert answers[side].ending == "end of text" or len(answers[side].tokens) == 128 - count
    assert any(answers[side].ending == "length" for side in SIDES)


def test_answers_grow_in_turns_one_token_at_a_time(pair: Pair) -> None:
    seen = [
        tuple(len(answers[side].tokens) for side in SIDES)
        for answers in pair.ask(Question("Ada was born", 6))
    ]
    assert seen[0] == (0, 0)
    for (a, b), (c, d) in itertools.pairwise(seen):
        assert (c - a) + (d - b) in (0, 1)
    assert any(0 < a < seen[-1][0] and 0 < b < seen[-1][1] for a, b in seen)


def test_stopping_keeps_what_is_there(pair: Pair) -> None:
    asked = 0

    def stopped() -> bool:
        nonlocal asked
        asked += 1
        return asked > 7

    *_, answers = pair.ask(Question("Ada was born in", 60), stopped)
    assert [len(answers[side].tokens) for side in SIDES] == [4, 3]
    assert {answers[side].ending for side in SIDES} == {"stopped"}


def test_the_same_seed_draws_the_same_and_another_does_not(pair: Pair) -> None:
    def drawn(seed: int, side: Side) -> list[int]:
        return pair.answers(Question("Ada", 12, temperature=1.0, seed=seed))[side].ids

    assert drawn(3, "unlearned") == drawn(3, "unlearned")
    assert len({tuple(drawn(seed, "unlearned")) for seed in range(4)}) > 1


def test_draws_follow_the_model_and_shown_probabilities_have_temperature_1(pair: Pair) -> None:
    voice = pair.voices["unlearned"]
    temperature = 2.0
    before = voice.tokenizer("Ada")["input_ids"]
    with torch.no_grad():
        logits = voice.model(input_ids=torch.tensor([before])).logits[0, -1].double()
    expected = (logits / temperature).softmax(-1)
    own = logits.softmax(-1)
    draws = 200
    counts: Counter[int] = Counter()
    for seed in range(draws):
        (token,) = pair.answers(Question("Ada", 1, temperature, seed))["unlearned"].tokens
        counts[token.id] += 1
        assert token.probability == pytest.approx(float(own[token.id]), rel=1e-3, abs=1e-6)
    likeliest = int(expected.argmax())
    share, chance = counts[likeliest] / draws, float(expected[likeliest])
    # Four standard deviations of a binomial share.
    assert abs(share - chance) < 4 * (chance * (1 - chance) / draws) ** 0.5 + 1e-9


def test_two_askers_at_once_get_what_each_would_alone(
    pair: Pair, forget_rows: list[dict[str, str]]
) -> None:
    prompts = [row["input"] for row in forget_rows[:3]]
    alone = [pair.answers(Question(prompt, 15))["target"].tokens for prompt in prompts]
    found: dict[int, Any] = {}

    def ask(number: int) -> None:
        found[number] = pair.answers(Question(prompts[number], 15))["target"].tokens

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(3)] == alone


def test_each_token_may_be_computed_by_another_thread(pair: Pair) -> None:
    question = Question("Ada was born in a small", 8)
    expected = pair.answers(question)
    running = pair.ask(question)
    last: list[Any] = []

    def advance() -> None:
        last.append(next(running, None))

    while not last or last[-1] is not None:
        thread = threading.Thread(target=advance)
        thread.start()
        thread.join()
    assert {side: last[-2][side].tokens for side in SIDES} == {
        side: expected[side].tokens for side in SIDES
    }
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"prompt": " \n"}, "prompt is empty"),
        ({"tokens": 0}, "new tokens 0: must be from 1 to 1024"),
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_questions_that_cannot_be_asked(values: dict[str, Any], told: str) -> None:
    assert told in refusal(lambda: Question(**{"prompt": "x", "tokens": 3, **values}))


def test_a_prompt_that_fills_the_context_is_refused(pair: Pair) -> None:
    told = refusal(lambda: pair.answers(Question("word " * 200, 5)))
    assert "fills the context of 128" in told
    assert "word" not in told
