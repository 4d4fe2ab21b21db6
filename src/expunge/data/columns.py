"""What a record's columns mean: those that `--columns` names, or one of the known forms.

Only what is certain is inferred. A column that looks like text and that nothing reads is refused.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import regex  # type: ignore[import-untyped]

from expunge.data.formats import Role
from expunge.data.words import NO_BLANKS
from expunge.errors import InputError

Kind = Literal["sc", "qa"]
"""`sc`: the output continues the input (regurgitation); `qa`: it answers it (knowledge)."""
Turns = tuple[tuple[str, str], ...]
"""Role and content of chat turns."""
Mapped = Mapping[str, tuple[str, ...]]
"""Columns by what they stand for, as `--columns` says."""

_TARGETS = ("prompt", "output", "text", "id", "task", "kind", "document")
_PART = "\n"
"""Between the columns of one prompt."""


@dataclass(frozen=True)
class Form:
    """Columns that make a row; without `output` the first is a whole text or a chat."""

    prompt: tuple[str, ...]
    output: str | None = None
    kind: Kind | None = None
    """What such rows are; None where the form does not say."""

    @property
    def columns(self) -> tuple[str, ...]:
        """All that are read."""
        return self.prompt if self.output is None else (*self.prompt, self.output)


_FORMS = (
    Form(("input",), "output"),
    Form(("question",), "answer", "qa"),
    Form(("prompt",), "completion"),
    Form(("prompt",), "gt", "sc"),
    Form(("instruction", "input"), "output", "qa"),
    Form(("instruction",), "output", "qa"),
    Form(("text",), "labels"),
    Form(("messages",), kind="qa"),
    Form(("conversations",), kind="qa"),
    Form(("text",), kind="sc"),
    Form(("document",), kind="sc"),
)
"""SemEval and LUME, TOFU, TRL, MUSE, Alpaca with and without an input, KnowUnDo, chats (OpenAI's form
and ShareGPT's), plain texts, and SemEval's member files. Of several that fit, the one that reads most
columns is meant."""
_OTHER_WORDINGS = {
    "answer": ("paraphrased_answer", "perturbed_answer", "original_answer", "paraphrased_question")
}
"""Columns of TOFU's files that repeat a row in other words, by the output that they go with."""
_SHAREGPT = {"human": "user", "gpt": "assistant"}
"""Its names of roles."""
_KNOWN = {*_TARGETS, "response"}.union(*(form.columns for form in _FORMS))
_PLAIN_NAME = re.compile(r"[A-Za-z_]\w{0,39}", re.ASCII)

_PLACES = regex.compile(
    rf"(?<=\S) (?=\S)|(?<=\S)(?=[{NO_BLANKS}])(?!\p{{M}})|(?<=[{NO_BLANKS}])(?=[\p{{L}}\p{{N}}])"
)
_BLANKS = re.compile(r"(?<=\S)\s+(?=\S)")
_WORDS = regex.compile(rf"[^\W\d_]{{2,}}\W*\s\W*[^\W\d_]{{2,}}|[{NO_BLANKS}]{{2,}}")
_LUME_ID = re.compile(r'^(?P<document>"?[0-9a-f]{8}-[0-9a-f-]*[0-9a-f]"?|.*[\W\d_]|)(?P<kind>sc|qa)\d+$')
"""After a letter `sc` and `qa` may end a word (disc1), except after LUME's hexadecimal numbers."""
_MARKUP = re.compile(r"[\s:：.,!！#*_'\"»”’)\]」』】-]+")
_TAGS = re.compile(r"<[^<>]*>|\[[^\[\]]*\]")
_TAIL = 80
"""Characters in which a question mark and the cue after it must stand."""
_CUES = frozenset(
    re.findall(
        r"\S+",
        "answer a response assistant model antwort réponse respuesta risposta resposta svar odpowiedź"
        " cevap jawaban ответ відповідь απάντηση الجواب الإجابة جواب उत्तर উত্তর 答 答案 回答 解答 답 답변"
        " 정답 คำตอบ",
    )
)
"""What asks for the answer after a wrapped question ("Question: ...?\\nAnswer:")."""


class OtherColumns(InputError):
    """Columns of no known form; `plain` is what to say where there is no --columns."""

    def __init__(self, said: str, mend: str, plain: str) -> None:
        super().__init__(f"{said}; {mend}")
        self.plain = f"{said}; {plain}"


@dataclass(frozen=True, repr=False)
class Parts:
    """The texts of one row, and the form in which they stood."""

    prompt: str
    output: str
    joiner: str
    form: Form
    turns: Turns = ()
    """What was said before the prompt, in a chat of several turns."""


def mapped_columns(columns: str | None, role: Role) -> Mapped:
    """`--columns` for one set: `prompt=instruction+input,output=output`.

    `retain.output=answer` holds for the retain set alone and stands before what holds for all. Raises
    InputError for what is not of this form.
    """
    found: dict[str, dict[str, tuple[str, ...]]] = {"": {}, **{side: {} for side in get_args(Role)}}
    for entry in columns.split(",") if columns is not None else ():
        name, _, given = entry.strip().partition("=")
        side, _, target = name.rpartition(".")
        target = "prompt" if target == "input" else target
        names = tuple(given.split("+")) if target == "prompt" else (given,)
        known = target in _TARGETS and side in found and all(names)
        if not known or target in found[side]:
            raise InputError(
                f"--columns {entry}: is not NAME=COLUMN, or stands there twice; give each of"
                f" {', '.join(_TARGETS)} once, alone or after {', '.join(get_args(Role))} and a dot"
            )
        found[side][target] = names
    own = found[role]
    pair = {"prompt", "output"}
    dropped = pair if "text" in own else {"text"} if pair & set(own) else set()
    mapped = {name: names for name, names in found[""].items() if name not in dropped} | own
    if len(pair & set(mapped)) + 2 * ("text" in mapped) not in (0, 2):
        raise InputError(f"--columns {columns}: name prompt and output together, or text alone")
    return mapped


def parts_of(values: Mapping[str, object], mapped: Mapped, joiner: str) -> Parts:
    """Prompt and output of a record. Raises InputError that names the column and shows no text."""
    for names in mapped.values():
        for name in names:
            if name not in values:
                raise _missing(values, name)
    if "text" in mapped:
        form = Form(mapped["text"], kind="sc")
    elif "prompt" in mapped:
        form = Form(mapped["prompt"], mapped["output"][0])
    else:
        form = _form_of(values)
        _check_unused(values, form, {name for names in mapped.values() for name in names})
    first, output = form.prompt[0], form.output
    chat = [values.get(name) for name in form.columns]
    is_chat = output is not None and all(isinstance(turns, list) for turns in chat)
    if is_chat or first in ("messages", "conversations"):
        *turns, prompt, answer = _turns(first, chat)
        return Parts(prompt[1], answer[1], joiner, Form(form.prompt, output, "qa"), tuple(turns))
    if output is None:
        return Parts(*_halves(first, text_in(values, first)), form)
    # A column of several may be empty, as Alpaca's input is.
    given = {name: values.get(name) for name in form.prompt}
    filled = [name for name, text in given.items() if text is not None and str(text).strip()]
    prompts = [text_in(values, name) for name in filled or form.prompt]
    return Parts(_PART.join(prompts), text_in(values, output), joiner, form)


def kind_of(given: object, form: Form, row_id: str, prompt: str) -> tuple[Kind, str]:
    """The kind and what told it: the column `kind`, the form, LUME's ids, or a question mark."""
    if given == "sc" or given == "qa":
        return given, "the column kind"
    if given is not None and given != "":
        raise InputError(f"column 'kind' holds another value; write {' or '.join(get_args(Kind))}")
    if form.kind is not None:
        return form.kind, f"the columns {', '.join(form.columns)}"
    if match := _LUME_ID.match(row_id):
        return ("qa" if match["kind"] == "qa" else "sc"), "the id"
    return ("qa", "a question mark") if _asks(prompt) else ("sc", "no sign, so sc")


def document_in(row_id: str) -> str | None:
    """The document that LUME's ids name before `sc` or `qa`; None for another id."""
    match = _LUME_ID.match(row_id)
    return (match and match["document"]) or None


def text_in(values: Mapping[str, object], column: str) -> str:
    """A column's text. Raises InputError where it is missing, empty or no text."""
    if column not in values:
        raise _missing(values, column)
    value = values[column]
    if not isinstance(value, str):
        raise InputError(f"column {column!r} holds a {type_name(value)}; use text")
    check_characters(column, value)
    if not value.strip():
        raise InputError(f"column {column!r} is empty; fill it or drop the row")
    return value


def check_characters(column: str, value: str) -> None:
    """Raises InputError for what no file can hold."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"column {column!r} holds half a character (a lone surrogate); take it out"
        ) from None


def type_name(value: object) -> str:
    """What a value is, in JSON's word for none."""
    return "null" if value is None else type(value).__name__


def _missing(values: Mapping[str, object], column: str) -> InputError:
    # Any other name may be text, of a CSV file without a header for example.
    need = "rows need 'input' and 'output', or 'text'"
    return OtherColumns(
        f"has no column {column!r} (found: {_shown(values, _KNOWN)})",
        f"{need}, or --columns prompt=A,output=B with their names",
        need,
    )


def _form_of(values: Mapping[str, object]) -> Form:
    filled = {name for name, value in values.items() if value is not None}
    for names in (filled, set(values)):
        fitting = [form for form in _FORMS if names.issuperset(form.columns)]
        if fitting:
            return max(fitting, key=lambda form: len(form.columns))
    return _FORMS[0]


def _check_unused(values: Mapping[str, object], form: Form, mapped: set[str]) -> None:
    used = {*form.columns, *mapped, "id", "task", "kind", "document"}
    used.update(_OTHER_WORDINGS.get(form.output or "", ()))
    unused = {n: v for n, v in values.items() if n not in used and _is_text(v, n in _KNOWN)}
    # A row that lacks a column is told that first.
    if unused and values.keys() >= set(form.columns):
        taken = "+".join(form.prompt)
        without = f"prompt={taken},output={form.output}" if form.output else f"text={taken}"
        raise OtherColumns(
            f"columns {_shown(unused, set(filter(_PLAIN_NAME.fullmatch, unused)))} look like text and"
            " are not used",
            f"say what is: --columns {without} leaves them out",
            "take them out",
        )


def _is_text(value: object, known: bool) -> bool:
    """Whether it holds words; of a column whose name is that of a text one word is enough."""
    if isinstance(value, str):
        return bool(value.strip()) if known else _WORDS.search(value) is not None
    if isinstance(value, Mapping):
        value = list(value.values())
    return isinstance(value, list | tuple) and any(_is_text(each, known) for each in value)


def _shown(names: Iterable[str], plain: Container[str]) -> str:
    """The names that are `plain`; how many others there are."""
    names = list(names)
    shown = [repr(name) for name in names if name in plain]
    others = len(names) - len(shown)
    return ", ".join([*shown, *([f"{others} others"] if others else [])]) or "none"


def _turns(column: str, chat: Sequence[object]) -> list[tuple[str, str]]:
    """Every turn; the last two are what was asked and what goes."""
    turns = []
    for turn in [turn for part in chat if isinstance(part, list) for turn in part]:
        told = turn if isinstance(turn, dict) else {}
        role, text = told.get("role", told.get("from")), told.get("content", told.get("value"))
        if not isinstance(role, str) or not isinstance(text, str) or not text.strip():
            raise InputError(
                f"column {column!r} holds a turn without a 'role' and a 'content', or a 'from' and a"
                " 'value', of text; write both"
            )
        check_characters(column, text)
        turns.append((_SHAREGPT.get(role, role), text))
    if [role for role, _ in turns[-2:]] != ["user", "assistant"]:
        raise InputError(
            f"column {column!r} does not end with a user's and an assistant's turn; cut it there"
        )
    return turns


def _halves(column: str, text: str) -> tuple[str, str, str]:
    """A plain text cut nearest its middle, between words, and what stood at the cut.

    In a script without blanks words are not told apart, and a cut is before any letter or digit.
    """
    stripped = text.strip()
    cuts = list(_PLACES.finditer(stripped)) or list(_BLANKS.finditer(stripped))
    if not cuts:
        raise InputError(
            f"column {column!r} is a single word, and a text is split in two to be continued; give a"
            " longer one, or 'input' and 'output'"
        )
    cut = min(cuts, key=lambda each: abs(each.start() - len(stripped) / 2))
    return stripped[: cut.start()], stripped[cut.end() :], cut[0]


def _asks(prompt: str) -> bool:
    """Whether a question mark of any script ends it, but for closing marks, tags and a cue."""
    tail = prompt.rstrip()[-_TAIL:]
    marks = [n for n, letter in enumerate(tail) if "QUESTION MARK" in unicodedata.name(letter, "")]
    # Greek's is the semicolon, under NFC the very same.
    if tail.endswith(";") and "GREEK" in unicodedata.name(tail[-2:-1] or " ", ""):
        return True
    if not marks:
        return False
    rest, tags = _TAGS.subn("", tail[marks[-1] + 1 :])
    words = [word for word in _MARKUP.split(rest.casefold()) if word]
    cued = tags > 0 or rest.rstrip().endswith((":", "："))
    return not words or (cued and _CUES.issuperset(words))
