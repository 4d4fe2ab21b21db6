"""Four-choice questions: MMLU's prompt, its files, and scores that no batch can change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from conftest import FAMILIES, refusal, shaken, tiny_model
from expunge.evaluation.multiple_choice import (
    Question,
    accuracy,
    check_prompts,
    choice_log_probs,
    prompt_for,
    read_questions,
    shared_prefixes,
)

QUESTION = Question("high_school_physics", "What falls?", ("up", "down", "left", "right"), 1)
SOLVED = Question("high_school_physics", "What is 1+1?", ("2", "3", "4", "5"), 0)


def test_the_prompt_is_mmlus() -> None:
    header = "The following are multiple choice questions (with answers) about high school physics.\n\n"
    asked = "What falls?\nA. up\nB. down\nC. left\nD. right\nAnswer:"
    solved = "What is 1+1?\nA. 2\nB. 3\nC. 4\nD. 5\nAnswer: A\n\n"
    assert prompt_for(QUESTION) == header + asked
    assert prompt_for(QUESTION, [SOLVED, SOLVED]) == header + solved + solved + asked


def full_softmax(model: Any, tokenizer: Any, prompt: str) -> list[float]:
    """One continuation at a time: the probability of the token in which it differs."""
    scores = []
    for letter in "ABCD":
        ids = tokenizer(f"{prompt} {letter}")["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids[:-1]])).logits[0, -1].double()
        scores.append(float(torch.log(torch.exp(logits[ids[-1]]) / torch.exp(logits).sum())))
    return scores


PROMPTS = ["Ada", "Which is 1? Answer:", "Ben was born in a small house. Answer:", "A B C D"]


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_scores_are_those_of_each_continuation_alone(family: str, tokenizer: Any) -> None:
    model = shaken(tiny_model(family, len(tokenizer)))
    expected = torch.tensor([full_softmax(model, tokenizer, prompt) for prompt in PROMPTS])
    for batch_size in (1, 3, 64):
        counted: list[int] = []
        scores = choice_log_probs(model, tokenizer, PROMPTS, batch_size, counted.append)
        # float32 against double; a padded batch sums in another order.
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(scores.argmax(1), expected.argmax(1))
        assert sum(counted) == len(PROMPTS)


HEADERS = [
    "Ada was born in a small house near the river of Paris. " * 3,
    "Ben's number is 90-1. " * 4,
]
SHARING = [header + ask for header in HEADERS for ask in ("Who? Answer:", "What? Answer:", "Ada", "")]


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_a_shared_start_computed_once_changes_no_score(family: str, tokenizer: Any) -> None:
    model = shaken(tiny_model(family, len(tokenizer)))
    asked = [*SHARING, *PROMPTS, SHARING[0]]
    texts = [tokenizer(prompt)["input_ids"] for prompt in asked]
    assert sum(shared > 0 for shared, _ in shared_prefixes(texts)) == 2
    expected = torch.tensor([full_softmax(model, tokenizer, prompt) for prompt in asked])
    for batch_size in (1, 3, 64):
        scores = choice_log_probs(model, tokenizer, asked, batch_size)
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


@given(
    texts=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=90), min_size=1, max_size=9),
    start=st.lists(st.integers(0, 2), max_size=70),
)
def test_groups_share_what_they_say_and_hold_every_text_once(
    texts: list[list[int]], start: list[int]
) -> None:
    texts = [[*start, *text] for text in texts]
    groups = shared_prefixes(texts)
    assert sorted(index for _, group in groups for index in group) == list(range(len(texts)))
    for shared, group in groups:
        assert len({tuple(texts[index][:shared]) for index in group}) == 1
        assert all(len(texts[index]) > shared for index in group)


def characters_tokenizer() -> Any:
    """One token a character: the space before a letter is a token that the four share."""
    symbols = [chr(code) for code in range(32, 127)] + ["\n"]
    inner = Tokenizer(models.BPE({symbol: n for n, symbol in enumerate(symbols)}, []))
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def test_a_space_of_its_own_is_part_of_the_prompt() -> None:
    tokenizer = characters_tokenizer()
    assert len(tokenizer("x: A")["input_ids"]) == 4
    model = shaken(tiny_model("llama", len(tokenizer)))
    expected = torch.tensor([full_softmax(model, tokenizer, prompt) for prompt in ("x:", "yy:")])
    scores = choice_log_probs(model, tokenizer, ["x:", "yy:"], 2)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("vocabulary", [("Q:",), ("Q:", "A"), ("Q:", "A", "B", "C")])
def test_letters_that_are_no_tokens_are_refused(vocabulary: tuple[str, ...]) -> None:
    ids = {word: n for n, word in enumerate((*vocabulary, "<unk>"))}
    inner = Tokenizer(models.WordLevel(ids, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    if len(vocabulary) == 4:  # D alone may be unknown: the four still differ
        check_prompts(tokenizer, ["Q:"], 10)
        return
    message = refusal(lambda: check_prompts(tokenizer, ["Q:"], 10))
    assert "does not tell the letters A to D apart by one token" in message


def test_a_prompt_beyond_the_context_is_refused_by_number(tokenizer: Any) -> None:
    message = refusal(lambda: check_prompts(tokenizer, ["short", "long " * 200], 128))
    assert message.startswith("question 2: its prompt has ")
    assert "the context has 128; use fewer --mmlu-shots" in message


def test_accuracy_is_the_share_of_right_letters() -> None:
    scores = torch.tensor([[0.0, 1.0, 0.5, 0.2], [0.0, 1.0, 0.5, 0.2], [3.0, 1.0, 0.5, 0.2]])
    assert accuracy(scores, [QUESTION, SOLVED, SOLVED]) == pytest.approx(2 / 3)


def test_files_are_read_by_subject(quiz_dir: Path) -> None:
    questions, examples = read_questions(quiz_dir, shots=1)
    assert questions[1] == Question("counting", "Which is 2?", ("2", "12", "22", "32"), 0)
    assert [question.question for question in examples["counting"]] == ["Which is 1?"]
    assert read_questions(quiz_dir)[1] == {}


def test_quoted_fields_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    path = tmp_path / "test" / "law_test.csv"
    path.write_text('\ufeff"Is it,\nor ""not""?",a,"b, c",d,e, C\n', encoding="utf-8")
    (question,), _ = read_questions(tmp_path)
    assert question == Question("law", 'Is it,\nor "not"?', ("a", "b, c", "d", "e"), 2)


CANARY = "canary-4711"
FAULTS: dict[str, tuple[str | bytes, str]] = {
    "fields": (f"q,a,b,c,d,A\n{CANARY},a,b,c,B\n", "row 2: is not question,A,B,C,D,answer"),
    "letter": (f"{CANARY},a,b,c,d,E\n", "row 1: is not question,A,B,C,D,answer"),
    "empty": ("", "holds no questions"),
    "latin": (f"{CANARY}é,a,b,c,d,A\n".encode("latin-1"), "is not UTF-8"),
    "huge": (f"q,a,b,c,d,A\n{CANARY * 12_000},a,b,c,d,A\n", "row 2: is not CSV"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_names_file_and_row_and_shows_no_text(fault: str, tmp_path: Path) -> None:
    content, words = FAULTS[fault]
    (tmp_path / "test").mkdir()
    path = tmp_path / "test" / "law_test.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refusal(lambda: read_questions(tmp_path))
    assert message.startswith(str(path))
    assert words in message
    assert CANARY not in message


def test_what_is_missing_of_a_directory_is_named(quiz_dir: Path, tmp_path: Path) -> None:
    message = refusal(lambda: read_questions(tmp_path))
    assert message.startswith(f"{tmp_path}: holds no test/<subject>_test.csv")
    message = refusal(lambda: read_questions(quiz_dir, shots=5))
    assert message.endswith("counting_dev.csv has 2 questions; ask for no more")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "law_test.csv").write_text("q,a,b,c,d,A\n")
    message = refusal(lambda: read_questions(tmp_path, shots=1))
    assert message.endswith("law_dev.csv: not found; add it, or give --mmlu-shots 0")
