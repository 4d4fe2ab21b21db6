"""Masks of prompt and answer against slow references, special tokens, long rows and templates."""

from __future__ import annotations

import copy
import os
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from conftest import refusal, with_ends
from expunge.data.rows import Row, as_rows
from expunge.data.tokenization import (
    Example,
    TextPolicy,
    answer_ids,
    count_windowed,
    encode_rows,
    prompt_ids,
    writable,
)
from expunge.evaluation.scores import knowledge

CANARY = "canary"
WIDE = TextPolicy(1000)


def words_tokenizer(size: int = 100) -> Any:
    """One token a word: w0, w1, ...; zero-width spaces are dropped, as many normalisers do."""
    inner = Tokenizer(models.WordLevel({f"w{n}": n for n in range(size)} | {"<unk>": size}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.normalizer = normalizers.Replace("\u200b", "")
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


def one(row: Row, tokenizer: Any, policy: TextPolicy = WIDE, *, eos: bool = False) -> Example:
    (example,) = encode_rows([row], tokenizer, policy, eos=eos)
    return example


def test_masks_agree_with_decoding_token_by_token(
    tokenizer: Any, forget_rows: list[dict[str, str]], retain_rows: list[dict[str, str]]
) -> None:
    rows = as_rows(forget_rows + retain_rows, "forget")
    for row, example in zip(rows, encode_rows(rows, tokenizer, WIDE, eos=False), strict=True):
        expected, text = [], ""
        for token in example.input_ids:
            text += tokenizer.decode([token])
            expected.append(len(text) > len(row.input))
        assert text == row.text
        assert list(example.answer_mask) == expected
        assert all(example.token_mask)
        assert (example.row_id, example.task) == (row.id, row.task)


@pytest.mark.parametrize("output", ["naïve", "東京 😀", "\n\tx ", "<|pad|>", "…"])
def test_answers_of_any_script_are_marked_whole(tokenizer: Any, output: str) -> None:
    row = Row("a", "Über 😀", output)
    example = one(row, tokenizer)
    marked = [i for i, flag in zip(example.input_ids, example.answer_mask, strict=True) if flag]
    assert tokenizer.decode(marked) == " " + output
    assert list(example.answer_mask) == sorted(example.answer_mask)


def border_tokenizer() -> Any:
    """BPE that merges across spaces: "a b" becomes one token."""
    merges = [("a", " "), ("a ", "b")]
    vocabulary = {token: n for n, token in enumerate(["x", "a", "b", " ", "a ", "a b"])}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocabulary, merges)))


def test_a_token_across_the_border_counts_as_answer() -> None:
    tokenizer = border_tokenizer()
    row = Row("a", "xxa", "bx")
    example = one(row, tokenizer)
    assert tokenizer.convert_ids_to_tokens(example.input_ids) == ["x", "x", "a b", "x"]
    assert example.answer_mask == (False, False, True, True)
    # Counting the tokens of the prompt alone, as is often done, would lose the border's token.
    counted = len(tokenizer(row.input)["input_ids"])
    assert (False,) * counted + (True,) * (len(example) - counted) != example.answer_mask


def test_only_retained_text_ends_with_an_eos_that_counts(tokenizer: Any) -> None:
    row = Row("a", "Ada lives in", "Paris.")
    kept, gone = one(row, tokenizer, eos=True), one(row, tokenizer, eos=False)
    assert kept.input_ids == (*gone.input_ids, tokenizer.eos_token_id)
    assert kept.answer_mask == (*gone.answer_mask, True)
    assert kept.token_mask == (*gone.token_mask, True)
    assert tokenizer.eos_token_id not in gone.input_ids
    assert WIDE.describe(tokenizer)["eos"] == "appended to retained rows only"
    assert WIDE.describe(tokenizer)["bos"] == "none"


def test_a_tokenizer_without_eos_gives_none() -> None:
    example = one(Row("a", "w1", "w2"), words_tokenizer(), eos=True)
    assert example.input_ids == (1, 2)
    assert WIDE.describe(words_tokenizer())["eos"] == "none"


def test_a_bos_that_the_tokenizer_adds_counts_nowhere(tokenizer: Any) -> None:
    row = Row("a", "Ada lives in", "Paris.")
    plain, changed = one(row, tokenizer), with_ends(tokenizer, "<s> $A")
    example = one(row, changed)
    assert example.input_ids == (changed.bos_token_id, *plain.input_ids)
    assert example.token_mask == (False, *plain.token_mask)
    assert example.answer_mask == (False, *plain.answer_mask)
    assert prompt_ids(row, changed, WIDE)[0] == changed.bos_token_id
    assert WIDE.describe(changed)["bos"] == "added by the tokenizer"


def test_an_eos_that_the_tokenizer_adds_is_not_doubled_and_ends_no_prompt(tokenizer: Any) -> None:
    row = Row("a", "Ada lives in", "Paris.")
    changed = with_ends(tokenizer, "<s> $A <|end|>")
    kept, gone = one(row, changed, eos=True), one(row, changed, eos=False)
    assert kept.input_ids == gone.input_ids
    assert kept.input_ids.count(changed.eos_token_id) == 1
    assert (kept.answer_mask[-1], kept.token_mask[-1]) == (True, True)
    assert (gone.answer_mask[-1], gone.token_mask[-1]) == (False, False)
    prompt = prompt_ids(row, changed, WIDE)
    assert prompt == [changed.bos_token_id, *prompt_ids(row, tokenizer, WIDE)]


def test_outputs_that_become_no_token_are_refused() -> None:
    rows = [Row("good", "w1", "w2"), Row("bad", "w1", "\u200b"), Row("too", "w1", "\u200b\u200b")]
    message = refusal(lambda: encode_rows(rows, words_tokenizer(), WIDE, eos=True))
    assert message.startswith("row 'bad': its output tokenises to nothing (2 such rows)")


def test_a_tokenizer_without_offsets_is_refused() -> None:
    slow: Any = SimpleNamespace(is_fast=False)
    message = refusal(lambda: encode_rows([Row("a", "x", "y")], slow, WIDE, eos=False))
    assert "gives no character offsets; use a tokenizer with a tokenizer.json" in message


def long_row(name: str, prompt: int, answer: int) -> Row:
    words = [f"w{n}" for n in range(prompt + answer)]
    return Row(name, " ".join(words[:prompt]), " ".join(words[prompt:]))


def test_rows_beyond_the_context_are_refused_with_counts() -> None:
    rows = [long_row("ok", 4, 4), long_row("bad", 5, 4), long_row("worst", 6, 6)]
    message = refusal(lambda: encode_rows(rows, words_tokenizer(), TextPolicy(8), eos=False))
    assert message == (
        "row 'worst': has 12 tokens, the context has 8 (2 such rows);"
        " shorten them or choose --long-rows window"
    )


WORDS = words_tokenizer()


@given(prompt=st.integers(1, 60), answer=st.integers(1, 40), context=st.integers(4, 30))
def test_windows_fit_and_count_each_token_exactly_once(prompt: int, answer: int, context: int) -> None:
    row = long_row("a", prompt, answer)
    windows = encode_rows([row], WORDS, TextPolicy(context, long_rows="window"), eos=False)
    counted: Counter[int] = Counter()
    answered: Counter[int] = Counter()
    for number, window in enumerate(windows):
        assert len(window) <= context
        # Token ids are positions here, so a window must be a run of them.
        assert list(window.input_ids) == list(range(window.input_ids[0], window.input_ids[-1] + 1))
        marks = list(zip(window.input_ids, window.token_mask, window.answer_mask, strict=True))
        assert any(token for _, token, _ in marks)
        if number:  # a counted token is predicted from a quarter of the context at least
            assert not any(token for _, token, _ in marks[: context // 4])
        # A window's first token is predicted from nothing, so no loss counts it.
        counted.update(i for i, token, _ in marks[1:] if token)
        answered.update(i for i, _, flag in marks[1:] if flag)
    total = prompt + answer
    assert counted == Counter(range(1, total))
    assert answered == Counter(range(prompt, total))
    assert count_windowed(windows) == (total > context)


def test_every_window_begins_with_the_bos_that_the_row_begins_with() -> None:
    changed = words_tokenizer()
    changed.add_special_tokens({"bos_token": "<s>"})
    begin = changed.bos_token_id
    changed.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", begin)]
    )
    policy = TextPolicy(8, long_rows="window")
    windows = encode_rows([long_row("a", 9, 11)], changed, policy, eos=False)
    assert {window.input_ids[0] for window in windows} == {begin}
    assert [len(window) for window in windows] == [8, 8, 8, 3]
    marks = [zip(w.input_ids, w.token_mask, w.answer_mask, strict=True) for w in windows]
    counted = [(token, answer) for window in marks for token, flag, answer in window if flag]
    assert counted == [(token, token >= 9) for token in range(20)]


CHATML = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def chat(tokenizer: Any, template: str) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def test_a_chat_template_is_prompt_until_the_answer_starts(tokenizer: Any) -> None:
    row = Row("a", "Who lives in Paris?", "Ada")
    changed = chat(with_ends(tokenizer, "<s> $A"), CHATML)
    policy = TextPolicy(1000, chat_template=True)
    example = one(row, changed, policy)
    marked = [i for i, flag in zip(example.input_ids, example.answer_mask, strict=True) if flag]
    assert changed.decode(marked) == "Ada"
    # The end of the turn is the template's EOS: not counted in forgotten rows, and never twice.
    pairs = zip(example.input_ids, example.token_mask, strict=True)
    left_out = changed.decode([i for i, flag in pairs if not flag])
    assert left_out == "<user></>\n<assistant></>\n"
    # What is special the template writes; the tokenizer adds nothing of its own.
    assert changed.bos_token_id not in example.input_ids
    prompt = prompt_ids(row, changed, policy)
    assert changed.decode(prompt) == "<user>Who lives in Paris?</>\n<assistant>"
    kept = one(row, changed, policy, eos=True)
    assert kept.input_ids == example.input_ids
    counted = [i for i, flag in zip(kept.input_ids, kept.answer_mask, strict=True) if flag]
    assert changed.decode(counted) == "Ada</>\n"


THINKING = (
    "<s>system\nBe brief.</>\n"
    "{% for m in messages %}<{{ m['role'] }}>\n{% if m['role'] == 'assistant' %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m['content'] | trim }}</>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
"""A system prompt, and before every answer an empty think block, as Qwen3's has it."""


@pytest.mark.parametrize("output", ["Bath", " Bath\n", "think", ".", "Be brief."])
@pytest.mark.parametrize("eos", [False, True])
def test_what_a_template_adds_is_no_text_and_no_answer(tokenizer: Any, output: str, eos: bool) -> None:
    changed, policy = chat(tokenizer, THINKING), TextPolicy(1000, chat_template=True)
    row = Row("a", "Where does Ada live? ", output)
    example = one(row, changed, policy, eos=eos)
    prompt = "<s>system\nBe brief.</>\n<user>\nWhere does Ada live?</>\n<assistant>\n"
    assert changed.decode(prompt_ids(row, changed, policy)) == f"{prompt}<think>\n\n</think>\n\n"

    def marked(mask: tuple[bool, ...]) -> str:
        pairs = zip(example.input_ids, mask, strict=True)
        return str(changed.decode([token for token, flag in pairs if flag]))

    end = "</>\n" if eos else ""
    assert marked(example.answer_mask) == output.strip() + end
    assert marked(example.token_mask) == f"Where does Ada live?{output.strip()}{end}"


def test_a_chat_keeps_its_earlier_turns_before_the_answer(tokenizer: Any) -> None:
    turns = (("system", "be brief"), ("user", "Hi"), ("assistant", "Hello"))
    row = Row("a", "Who lives in Paris?", "Ada", turns=turns)
    changed = chat(tokenizer, CHATML)
    policy = TextPolicy(1000, chat_template=True)
    prompt = changed.decode(prompt_ids(row, changed, policy))
    assert prompt.count("Hello") == prompt.count("be brief") == 1
    assert prompt.endswith("<user>Who lives in Paris?</>\n<assistant>")
    for chosen in (policy, TextPolicy(1000)):
        example = one(row, changed, chosen)
        for mask, text in ((example.answer_mask, "Ada"), (example.token_mask, f"{row.input}Ada")):
            marked = [i for i, flag in zip(example.input_ids, mask, strict=True) if flag]
            assert changed.decode(marked).replace("? ", "?").strip() == text


@pytest.mark.parametrize("joiner", ["", "\n", " "])
def test_the_answer_begins_after_the_joiner(joiner: str, tokenizer: Any) -> None:
    row = Row("a", "Who lives in Paris?", "Ada", joiner=joiner)
    example = one(row, tokenizer, TextPolicy(1000))
    assert tokenizer.decode(example.input_ids) == f"Who lives in Paris?{joiner}Ada"
    ids = prompt_ids(row, tokenizer, TextPolicy(1000))
    assert ids + answer_ids(row, ids, tokenizer, TextPolicy(1000)) == list(example.input_ids)


def test_a_template_that_is_missing_or_rewrites_the_prompt_is_refused(tokenizer: Any) -> None:
    policy = TextPolicy(1000, chat_template=True)
    row = Row("a", CANARY, CANARY)
    message = refusal(lambda: encode_rows([row], tokenizer, policy, eos=True))
    assert message.startswith("--chat-template on: the tokenizer has no chat template; give off")
    rewriting = chat(tokenizer, "{{ messages | length }}" + CHATML)
    message = refusal(lambda: encode_rows([row], rewriting, policy, eos=True))
    assert message.startswith("row 'a': the chat template renders the prompt differently")
    assert CANARY not in message
    # Qwen3's drops what stands before </think>: the row's answer would not be trained on as it is.
    cutting = chat(tokenizer, CHATML.replace("m['content']", "m['content'].split('y</')[-1]"))
    row = Row("a", "Who?", f"{CANARY}</think>Ada")
    message = refusal(lambda: encode_rows([row], cutting, policy, eos=True))
    assert "or rewrites the answer" in message
    assert CANARY not in message


def test_a_repr_shows_no_text_and_no_token(tokenizer: Any) -> None:
    example = one(Row("a", CANARY, CANARY), tokenizer)
    assert repr(example) == f"Example(row_id='a', tokens={len(example)})"


def test_a_token_that_the_model_has_no_embedding_for_is_refused_by_row_and_id(
    tokenizer: Any,
) -> None:
    """A tokenizer that was extended alone; what no row uses may be beyond the embeddings."""
    extended = copy.deepcopy(tokenizer)
    size = len(tokenizer)
    extended.add_tokens(["<new>"])
    policy = TextPolicy(100, vocabulary=size)
    plain, new = as_rows([{"input": "What?", "output": t} for t in ("Oslo", "<new>")], "forget")
    assert encode_rows([plain], extended, policy, eos=True)
    message = refusal(lambda: encode_rows([plain, new], extended, policy, eos=True))
    assert message.startswith(
        f"row {new.id!r}: has the token id {size}, the model has {size} embeddings"
    )
    asked = replace(new, input="<new>?")
    assert refusal(lambda: prompt_ids(asked, extended, policy)).startswith(f"row {new.id!r}: has the")
    assert encode_rows([new], extended, replace(policy, vocabulary=size + 1), eos=True)


@pytest.mark.parametrize(
    "template", ["{{ raise_exception(messages[0].content) }}", "{% if %}", "{{ 1 / 0 }}"]
)
def test_a_template_that_fails_is_told_without_the_text(template: str, tokenizer: Any) -> None:
    templated = copy.deepcopy(tokenizer)
    templated.chat_template = template
    (row,) = as_rows([{"input": f"What is {CANARY}?", "output": CANARY}], "forget")
    policy = TextPolicy(100, chat_template=True)
    for call in (encode_rows, prompt_ids):
        given: Any = row if call is prompt_ids else [row]
        options: dict[str, Any] = {} if call is prompt_ids else {"eos": True}
        message = refusal(lambda: call(given, templated, policy, **options))  # noqa: B023
        assert message.startswith(f"row {row.id!r}: the tokenizer or chat template fails on")
        assert CANARY not in message


def test_a_pattern_that_panics_is_told_by_row_alone(
    tokenizer: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """Oniguruma gives up on a search; Rust's panic is no Exception, and prints lines of its own."""
    slow = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    endless = pre_tokenizers.Split(Regex(r"((?:(?=(.+))\2?.)+)+q?[^\x00-\x7f]"), "isolated")
    slow.pre_tokenizer = pre_tokenizers.Sequence([endless, pre_tokenizers.ByteLevel()])
    hostile = PreTrainedTokenizerFast(tokenizer_object=slow)
    (row,) = as_rows([{"input": "a " * 40, "output": CANARY}], "forget")
    message = refusal(lambda: encode_rows([row], hostile, TextPolicy(1000), eos=False))
    assert message.startswith(f"row {row.id!r}: ")
    assert "fails on its text (PanicException)" in message
    assert capfd.readouterr().err == ""
    os.write(2, b"heard")
    assert capfd.readouterr().err == "heard"


@pytest.mark.parametrize(
    "normalizer",
    [
        normalizers.NFC(),
        normalizers.NFKC(),
        normalizers.Sequence([normalizers.NFKD(), normalizers.Prepend("\u2581")]),
        normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]),
        normalizers.BertNormalizer(),
    ],
)
def test_a_right_answer_in_the_form_that_the_tokenizer_writes_is_right(normalizer: Any) -> None:
    row = Row("a", "Where?", "Oﬃce Ｎｏ ５, Łódź ①", kind="qa")
    written = normalizer.normalize_str(row.output).replace("\u2581", " ")
    tokenizer: Any = SimpleNamespace(backend_tokenizer=SimpleNamespace(normalizer=normalizer))
    assert knowledge(writable(row, tokenizer).output, written) == 1
    assert knowledge(writable(row, tokenizer).output, "Office No 6, Łódź ①") == 0


def test_what_a_normaliser_makes_of_bytes_is_no_form_of_a_text(tokenizer: Any) -> None:
    row = Row("a", "Where?", "Łódź²")
    for normalizer in (None, normalizers.ByteLevel()):
        inner: Any = SimpleNamespace(backend_tokenizer=SimpleNamespace(normalizer=normalizer))
        assert writable(row, inner) is row
    assert writable(row, tokenizer).output == row.output
