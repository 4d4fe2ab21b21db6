"""From rows to token ids, with masks of what counts as text and what as answer.

The prompt is masked by character offsets in the tokenised whole text. Tokenising the prompt alone
and counting its tokens shifts the mask wherever a token spans the border.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from expunge.data.rows import Kind, Row
from expunge.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LongRows = Literal["refuse", "window"]


@dataclass(frozen=True, slots=True, repr=False)
class Example:
    """One tokenised row, or one window of a row that is longer than the context.

    `token_mask` marks the tokens that a loss over all tokens counts (never BOS, never the overlap of
    two windows), `answer_mask` those of the output. All three have the same length.
    """

    row_id: str
    task: str
    input_ids: tuple[int, ...]
    token_mask: tuple[bool, ...]
    answer_mask: tuple[bool, ...]
    kind: Kind = "sc"
    """A continuation, all of which is content, or a question with its answer."""
    listed: bool = True
    """Whether it is of the user's rows; False for random tokens."""

    def __len__(self) -> int:
        return len(self.input_ids)

    def __repr__(self) -> str:
        return f"Example(row_id={self.row_id!r}, tokens={len(self)})"


@dataclass(frozen=True)
class TextPolicy:
    """How a row becomes tokens; recorded in the manifest."""

    context: int
    """Longest sequence in tokens."""
    chat_template: bool = False
    """Render input and output as a user's and an assistant's turn."""
    long_rows: LongRows = "refuse"
    """Refuse rows beyond the context, or cut them into windows that overlap by a quarter."""

    def describe(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """What the manifest says: where BOS comes from, and that retained text ends with EOS."""
        probe = tokenizer("x")["input_ids"]
        adds_bos = tokenizer.bos_token_id is not None and probe[0] == tokenizer.bos_token_id
        return asdict(self) | {
            "bos": "added by the tokenizer" if adds_bos else "none",
            "eos": self._eos_policy(tokenizer),
        }

    def _eos_policy(self, tokenizer: PreTrainedTokenizerBase) -> str:
        if self.chat_template:
            return "the template's, counted in retained rows only"
        return "appended to retained rows only" if _eos(tokenizer) is not None else "none"


def encode_rows(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    policy: TextPolicy,
    *,
    eos: bool,
) -> list[Example]:
    """Tokenises `rows`; `eos` appends the end-of-text token and counts it as part of the answer.

    Forgotten rows carry no EOS: pushing its probability down would teach a model never to stop.
    Raises InputError for outputs without a token and, unless windowed, rows beyond the context.
    """
    if not tokenizer.is_fast:
        raise InputError(
            f"{type(tokenizer).__name__}: gives no character offsets;"
            " use a tokenizer with a tokenizer.json"
        )
    rows = list(rows)
    whole = [_encode(row, tokenizer, policy, eos=eos) for row in rows]
    empty = [example.row_id for example in whole if not any(example.answer_mask)]
    if empty:
        raise InputError(
            f"row {empty[0]!r}: its output tokenises to nothing"
            f" ({len(empty)} such rows); fill it or drop the row"
        )
    long = [example for example in whole if len(example) > policy.context]
    if long and policy.long_rows == "refuse":
        worst = max(long, key=len)
        raise InputError(
            f"row {worst.row_id!r}: has {len(worst)} tokens, the context has {policy.context}"
            f" ({len(long)} such rows); shorten them or choose --long-rows window"
        )
    return [window for example in whole for window in _windows(example, policy.context)]


def prompt_ids(row: Row, tokenizer: PreTrainedTokenizerBase, policy: TextPolicy) -> list[int]:
    """The tokens that generation starts from: `input` alone, or the user's turn of the template."""
    if policy.chat_template:
        prompt, _ = _chat_texts(row, tokenizer)
        return list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    encoded = tokenizer(row.input, return_special_tokens_mask=True)
    ids, special = list(encoded["input_ids"]), list(encoded["special_tokens_mask"])
    while len(ids) > 1 and special[len(ids) - 1]:  # an EOS that the tokenizer adds ends the text
        ids.pop()
    return ids


def answer_ids(
    row: Row, prompt: Sequence[int], tokenizer: PreTrainedTokenizerBase, policy: TextPolicy
) -> list[int]:
    """The tokens of the row's output: what a model that knows the row writes after `prompt`."""
    if policy.chat_template:
        return list(tokenizer(row.output, add_special_tokens=False)["input_ids"])
    whole = list(tokenizer(row.text)["input_ids"])
    if whole[: len(prompt)] == list(prompt):
        return whole[len(prompt) :]
    return list(tokenizer(f" {row.output}", add_special_tokens=False)["input_ids"])


def count_windowed(examples: Sequence[Example]) -> int:
    """How many rows were cut into more than one window."""
    counts: dict[str, int] = {}
    for example in examples:
        counts[example.row_id] = counts.get(example.row_id, 0) + 1
    return sum(count > 1 for count in counts.values())


def _encode(
    row: Row, tokenizer: PreTrainedTokenizerBase, policy: TextPolicy, *, eos: bool
) -> Example:
    if policy.chat_template:
        prompt, text = _chat_texts(row, tokenizer)
        answer_end = text.index(row.output.strip(), len(prompt)) + len(row.output.strip())
    else:
        prompt, text = row.input, row.text
        answer_end = len(text)
    encoded = tokenizer(
        text,
        add_special_tokens=not policy.chat_template,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
    )
    ids = list(encoded["input_ids"])
    special = [bool(flag) for flag in encoded["special_tokens_mask"]]
    answer, token = [], []
    for (start, end), flag in zip(encoded["offset_mapping"], special, strict=True):
        # What a template writes after the answer (its end of turn) is treated as EOS is.
        counted = not flag and (eos or start < answer_end)
        token.append(counted)
        # A token that spans the border holds part of the answer, so it counts as answer.
        answer.append(counted and end > max(len(prompt), start))
    end_id = _eos(tokenizer)
    if eos and not policy.chat_template and end_id is not None and any(answer):
        if ids[-1] == end_id:
            token[-1] = answer[-1] = True
        else:
            ids.append(end_id)
            token.append(True)
            answer.append(True)
    return Example(row.id, row.task, tuple(ids), tuple(token), tuple(answer), row.kind)


def _chat_texts(row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The rendered user's turn, and the rendered exchange that starts with it."""
    if not tokenizer.chat_template:
        raise InputError(
            "--chat-template: the tokenizer has no chat template; leave the option out"
        )
    user = {"role": "user", "content": row.input}
    assistant = {"role": "assistant", "content": row.output}
    prompt = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    text = tokenizer.apply_chat_template([user, assistant], tokenize=False)
    if not text.startswith(prompt) or row.output.strip() not in text[len(prompt) :]:
        raise InputError(
            f"row {row.id!r}: the chat template renders the prompt differently before an answer;"
            " leave --chat-template out"
        )
    return prompt, text


def _windows(example: Example, context: int) -> list[Example]:
    """Cuts a long example into overlapping windows in which every token counts exactly once."""
    if len(example) <= context:
        return [example]
    overlap = context // 4
    windows = []
    for start in range(0, len(example) - overlap, context - overlap):
        repeated = overlap if start else 0
        part = slice(start, start + context)
        windows.append(
            Example(
                example.row_id,
                example.task,
                example.input_ids[part],
                _without(example.token_mask[part], repeated),
                _without(example.answer_mask[part], repeated),
                example.kind,
            )
        )
    return windows


def _without(mask: Sequence[bool], repeated: int) -> tuple[bool, ...]:
    return (False,) * min(repeated, len(mask)) + tuple(mask[repeated:])


def _eos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    value = tokenizer.eos_token_id
    return value if value is None else int(value)
