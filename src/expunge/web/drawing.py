"""The pieces of the page as HTML. Jinja escapes every value, so text from outside stays text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from jinja2 import Environment

from expunge.data.rows import Row
from expunge.reporting.rendering import templates_of
from expunge.web.asking import SIDES, Answer, Side
from expunge.web.pieces import (
    STEPS,
    first_difference,
    pieces_of,
    typical_probability,
    written,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROLES: Mapping[Side, str] = {"target": "the model before", "unlearned": "the result of the run"}
_ENDINGS = {
    "writing": "writing",
    "end of text": "ended by itself",
    "length": "cut at the most new tokens",
    "stopped": "stopped",
}
_VISIBLE = {"\n": "↵", "\r": "␍", "\t": "⇥", " ": "␣"}
_EXACT = 1.0
ROW_HEADS = ["row", "set", "task", "kind", "input chars", "output chars"]


def stylesheet() -> str:
    """The page's own rules; every class begins with x-, so that none is Gradio's."""
    return _environment().get_template("page.css").render()


def head(run: str, target: str, method: str, finished: str, verdict: str, *, reveal: bool) -> str:
    """The top of the page: which two models these are."""
    title = "What does the model still know?"
    return _drawn("head", title, run, target, method, finished, reveal, verdict)


def legend() -> str:
    """What the colours of tokens mean."""
    return _drawn("legend", STEPS)


def empty_answer(side: Side, model: str) -> str:
    """A side before anything was asked."""
    return _drawn("answer", side, _ROLES[side], model, None, "Nothing asked yet.", None)


def answer(side: Side, model: str, given: Answer, tokenizer: PreTrainedTokenizerBase) -> str:
    """One side's answer, its tokens coloured."""
    typical = typical_probability(given)
    state = f"{counted(len(given.tokens), 'token')}, {_ENDINGS[given.ending]}"
    return _drawn(
        "answer",
        side,
        _ROLES[side],
        model,
        pieces_of(given, tokenizer),
        state,
        None if typical is None or given.ending == "writing" else written(typical),
    )


def comparison(answers: Mapping[Side, Answer], tokenizer: PreTrainedTokenizerBase) -> str:
    """Under two finished answers: where they part, and every probability as text."""
    parted = first_difference(answers["target"], answers["unlearned"])
    told = "Both answers are the same." if parted is None else f"They part at token {parted}."
    both = {side: pieces_of(answers[side], tokenizer) for side in SIDES}
    return note(told) + _drawn("values", both)


def outcomes(row: Row, texts: Mapping[Side, str], scores: Mapping[Side, float], *, reveal: bool) -> str:
    """What both models scored on a row; of their answers only the length."""
    lines = [
        {
            "side": side,
            "length": len(texts[side]),
            "score": scores[side],
            "meaning": _meaning(row, scores[side]),
        }
        for side in SIDES
    ]
    return _drawn("outcomes", row, lines, reveal)


def row_card(row: Row, split: str, *, reveal: bool) -> str:
    """One row: lengths, or its text."""
    return _drawn("row_card", row, split, reveal)


def note(text: str, kind: Literal["plain", "wrong"] = "plain") -> str:
    """A line about what happened."""
    return _drawn("note", text, kind)


def report_frame(page: str) -> str:
    """The report in a frame of its own, where its styles stay its own and no script runs."""
    # A frame without an address takes that of the page around it, and a link to one of the report's
    # sections would load that page into the frame.
    return _drawn("report", page.replace("<head>", '<head><base href="about:srcdoc"/>', 1))


def counted(number: int, what: str) -> str:
    """For example 1 token, 2 tokens."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def _meaning(row: Row, score: float) -> str:
    if score == _EXACT:
        return "all of it came back" if row.kind == "sc" else "it gives the row's answer"
    if row.kind == "sc" and score > 0:
        return f"{score:.0%} of its words came back, in order"
    return "nothing of it came back" if row.kind == "sc" else "it gives another answer"


def _drawn(macro: str, *values: Any) -> str:
    return str(getattr(_environment().get_template("page.html").module, macro)(*values)).strip()


@cache
def _environment() -> Environment:
    environment = templates_of("expunge.web", html=True)
    environment.filters["visible"] = _visible
    environment.globals["written"] = written
    return environment


def _visible(text: str) -> str:
    """White space as signs, in a table where it could not be seen."""
    return "".join(_VISIBLE.get(letter, letter) for letter in text)


def row_lines(rows: Mapping[str, Sequence[Row]]) -> list[list[Any]]:
    """Lines of the table of rows, below `ROW_HEADS`. No text of a row is in it."""
    return [
        [
            row.id, split, row.task, "continuation" if row.kind == "sc" else "question",
            len(row.input), len(row.output),
        ]
        for split, each in rows.items()
        for row in each
    ]  # fmt: skip
