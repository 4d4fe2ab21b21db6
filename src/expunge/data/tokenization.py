"""From rows to token ids, with masks of what counts as text and what as answer.

The prompt is masked by character offsets in the tokenised whole text. Tokenising the prompt alone
and counting its tokens shifts the mask wherever a token spans the border.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from expunge.data.chat_templates import check_template, date_in, rendered
from expunge.data.columns import Kind
from expunge.data.rows import Row, document_of
from expunge.data.words import bare
from expunge.errors import InputError, is_failure
from expunge.terminal import native_lines_dropped

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LongRows = Literal["refuse", "window"]
_MARKS = ("EXPUNGE-INPUT", "EXPUNGE-OUTPUT")
"""Stand in a rendered chat template where a row's texts go; nothing in them is trimmed or rewritten."""


@dataclass(frozen=True, slots=True, repr=False)
class Example:
    """One tokenised row, or one window of a row that is longer than the context.

    `token_mask` marks the tokens that a loss over all tokens counts (never BOS, never what a chat
    template writes before the answer, never the overlap of two windows), `answer_mask` those of the
    output. All three have the same length.
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
    weight: float = 1.0
    """How often it is taken in an epoch, on average; 1 or more."""
    document: str = ""
    """What the row is about: rows of one document belong together."""

    def __len__(self) -> int:
        return len(self.input_ids)

    def __repr__(self) -> str:
        return f"Example(row_id={self.row_id!r}, tokens={len(self)})"


@dataclass(frozen=True)
class TextPolicy:
    """How a row becomes tokens; recorded in the manifest."""

    context: int
    """Longest sequence in tokens; sys.maxsize, null in the manifest, for a model without a limit."""
    chat_template: bool = False
    """Render input and output as a user's and an assistant's turn."""
    long_rows: LongRows = "refuse"
    """Refuse rows beyond the context, or cut them into windows that overlap by a quarter."""
    vocabulary: int | None = None
    """Number of the model's embeddings: no token id may reach it. None: not checked."""
    template_choice: Mapping[str, Any] | None = None
    """What `--chat-template auto` decided by; None where it was given, or the tokenizer has none."""

    def describe(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """What the manifest says: where BOS comes from, and that retained text ends with EOS."""
        probe = tokenizer("x")["input_ids"]
        adds_bos = tokenizer.bos_token_id is not None and probe[0] == tokenizer.bos_token_id
        return asdict(self) | {
            "context": self.context if self.context < sys.maxsize else None,
            "date": date_in(tokenizer) if self.chat_template else None,
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
    Raises InputError for outputs without a token, for a chat template that does not end and, unless
    windowed, for rows beyond the context.
    """
    if not tokenizer.is_fast:
        raise InputError(
            f"{type(tokenizer).__name__}: gives no character offsets;"
            " use a tokenizer with a tokenizer.json"
        )
    if policy.chat_template and tokenizer.chat_template:
        check_template(tokenizer)
    rows = list(rows)
    whole = []
    for row in rows:
        with tokenizing(f"row {row.id!r}"):
            whole.append(_encode(row, tokenizer, policy, eos=eos))
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
    opening = opening_of(tokenizer)
    return [window for example in whole for window in _windows(example, policy.context, opening)]


@contextmanager
def tokenizing(what: str) -> Iterator[None]:
    """Names what a tokenizer or a template fails on; what they say and print can quote the text."""
    try:
        with native_lines_dropped():
            yield
    except InputError:
        raise
    except BaseException as error:
        if not is_failure(error):
            raise
        raise InputError(
            f"{what}: the tokenizer or chat template fails on its text ({type(error).__name__}); mend"
            " tokenizer.json or the template, give --chat-template off, or leave the text out"
        ) from None


def prompt_ids(
    row: Row, tokenizer: PreTrainedTokenizerBase, policy: TextPolicy, opening: str = ""
) -> list[int]:
    """The tokens that generation starts from: `input`, or all that a template has before `output`.

    Behind it stands `opening`, with which the answer is begun.
    """
    with tokenizing(f"row {row.id!r}"):
        if policy.chat_template:
            text, _, (start, _) = _chat_text(row, tokenizer)
            begun = text[:start] + opening
            return _known(row, tokenizer(begun, add_special_tokens=False)["input_ids"], policy)
        encoded = tokenizer(row.prompt + opening, return_special_tokens_mask=True)
    ids, special = list(encoded["input_ids"]), list(encoded["special_tokens_mask"])
    while len(ids) > 1 and special[len(ids) - 1]:  # an EOS that the tokenizer adds ends the text
        ids.pop()
    return _known(row, ids, policy)


def answer_ids(
    row: Row,
    prompt: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    policy: TextPolicy,
    opening: str = "",
) -> list[int]:
    """The tokens of the row's output: what a model that knows the row writes after `prompt`."""
    if policy.chat_template and not opening:
        return list(tokenizer(row.output, add_special_tokens=False)["input_ids"])
    whole = list(tokenizer(row.text)["input_ids"])
    if whole[: len(prompt)] == list(prompt):
        return whole[len(prompt) :]
    return list(tokenizer(f"{row.joiner}{row.output}", add_special_tokens=False)["input_ids"])


def writable(row: Row, tokenizer: PreTrainedTokenizerBase) -> Row:
    """The row with its output as the tokenizer's normaliser leaves it, for no answer has another form.

    NFKC makes two letters of a ligature, others drop case or accents; the marks that some put for blanks
    are blanks.
    """
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    if normalizer is None:
        return row
    output = normalizer.normalize_str(row.output).replace("\u2581", " ").strip()
    return replace(row, output=output) if bare(output) == bare(row.output) else row


def count_windowed(examples: Sequence[Example]) -> int:
    """How many rows were cut into more than one window."""
    counts: dict[str, int] = {}
    for example in examples:
        counts[example.row_id] = counts.get(example.row_id, 0) + 1
    return sum(count > 1 for count in counts.values())


def _encode(row: Row, tokenizer: PreTrainedTokenizerBase, policy: TextPolicy, *, eos: bool) -> Example:
    if policy.chat_template:
        text, (begin, prompt_end), (answer_start, answer_end) = _chat_text(row, tokenizer)
    else:
        text, prompt_end = row.text, len(row.prompt)
        begin = prompt_end - len(row.input)  # earlier turns are nobody's to forget
        answer_start, answer_end = prompt_end, len(text)
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
        of_template = start < begin >= end or prompt_end <= start < answer_start >= end
        # What a template writes after the answer (its end of turn) is treated as EOS is.
        counted = not flag and not of_template and (eos or start < answer_end)
        token.append(counted)
        # A token that spans the border holds part of the answer, so it counts as answer.
        answer.append(counted and end > max(answer_start, start))
    end_id = _eos(tokenizer)
    if eos and not policy.chat_template and end_id is not None and any(answer):
        if ids[-1] == end_id:
            token[-1] = answer[-1] = True
        else:
            ids.append(end_id)
            token.append(True)
            answer.append(True)
    _known(row, ids, policy)
    return Example(
        row.id,
        row.task,
        tuple(ids),
        tuple(token),
        tuple(answer),
        row.kind,
        document=document_of(row),
    )


def _known(row: Row, ids: Sequence[int], policy: TextPolicy) -> list[int]:
    """The ids as they are. Raises InputError for one that the model has no embedding for."""
    highest = max(ids, default=0)
    if policy.vocabulary is not None and highest >= policy.vocabulary:
        raise InputError(
            f"row {row.id!r}: has the token id {highest}, the model has {policy.vocabulary} embeddings;"
            " give its own tokenizer, or extend both together (resize_token_embeddings)"
        )
    return list(ids)


def _chat_text(
    row: Row, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, tuple[int, int], tuple[int, int]]:
    """The rendered exchange, and where in it, by characters, the row's input and its output stand.

    What a template writes between them (the turn's opening, an empty think block) is of neither.
    """
    if not tokenizer.chat_template:
        raise InputError(
            "--chat-template on: the tokenizer has no chat template; give off, or leave it out"
        )

    def exchange(texts: Sequence[str], *, opens: bool = False) -> str:
        said = [*row.turns, *zip(("user", "assistant"), texts, strict=False)]
        turns = [{"role": role, "content": text} for role, text in said]
        return rendered(tokenizer, turns, add_generation_prompt=opens)

    prompt = exchange([row.input], opens=True)
    text = exchange([row.input, row.output])
    before, _, rest = exchange(_MARKS).partition(_MARKS[0])
    between, _, after = rest.partition(_MARKS[1])
    # Some templates trim what they are given, on one side or both.
    for asked, told in itertools.product(*((t, t.strip()) for t in (row.input, row.output))):
        opening = before + asked + between
        if text == opening + told + after and opening.startswith(prompt):
            start = len(before)
            spans = (start, start + len(asked)), (len(opening), len(opening) + len(told))
            return text, *spans
    raise InputError(
        f"row {row.id!r}: the chat template renders the prompt differently before an answer,"
        " or rewrites the answer; give --chat-template off"
    )


def _windows(example: Example, context: int, opening: tuple[int, ...]) -> list[Example]:
    """Cuts a long example into overlapping windows in which every token counts exactly once.

    Where the example begins with `opening` (BOS), each window does: a model reads no text without it.
    """
    if len(example) <= context:
        return [example]
    lead = len(opening) if example.input_ids[: len(opening)] == opening else 0
    width = context - lead
    overlap = width // 4
    windows = []
    for start in range(lead, len(example) - overlap, width - overlap):
        repeated = overlap if start > lead else 0
        part = slice(start, start + width)
        windows.append(
            replace(
                example,
                input_ids=example.input_ids[:lead] + example.input_ids[part],
                token_mask=example.token_mask[:lead] + _without(example.token_mask[part], repeated),
                answer_mask=example.answer_mask[:lead] + _without(example.answer_mask[part], repeated),
            )
        )
    return windows


def _without(mask: Sequence[bool], repeated: int) -> tuple[bool, ...]:
    return (False,) * min(repeated, len(mask)) + tuple(mask[repeated:])


def opening_of(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The special tokens that the tokenizer puts before any text."""
    probe = tokenizer("x", return_special_tokens_mask=True)
    pairs = zip(probe["input_ids"], probe["special_tokens_mask"], strict=True)
    return tuple(token for token, _ in itertools.takewhile(lambda pair: pair[1], pairs))


def _eos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    value = tokenizer.eos_token_id
    return value if value is None else int(value)
