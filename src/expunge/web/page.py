"""The page in Gradio: a prompt to both models, the rows, the report.

Gradio keeps what a handler returns and sends it to the browser, so a handler returns no text of a row
unless it was revealed: not as a value, not as a choice, not as state.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import gradio as gr

from expunge.data.rows import Row
from expunge.data.tokenization import writable
from expunge.errors import InputError
from expunge.evaluation.generation import MAX_NEW_TOKENS
from expunge.reporting.rendering import page as report_page
from expunge.web import drawing
from expunge.web.asking import MOST_TOKENS, SIDES, Answer, Pair, Question, Side, row_score
from expunge.web.inputs import Checked

GREEDY, SAMPLE = "greedy", "sample"
_PAUSE = 0.05
"""Least seconds between two pictures of an answer that is being written."""
_DEFAULT_TOKENS = 64
_MOST_WAITING = 32
"""Calls that wait in the queue; one more is refused."""
_MODELS = "models"
"""All generations wait in one queue, for both models share one process."""

Drawn = tuple[str, str, str]
"""The target's side, the unlearned model's side, and what stands below."""


class Desk:
    """What the page's handlers do; no Gradio but the session's name."""

    def __init__(self, checked: Checked, pair: Pair) -> None:
        self._checked, self._pair = checked, pair
        self._stops: dict[str, threading.Event] = {}
        self.names: dict[Side, str] = {
            "target": checked.target.name,
            "unlearned": checked.unlearned.name,
        }
        self.rows: dict[str, tuple[str, Row]] = {
            f"{split}/{number}": (split, row)
            for split, rows in checked.rows.items()
            for number, row in enumerate(rows)
        }
        """Split and row by the key that the page knows them by."""

    @property
    def tokenizer(self) -> Any:
        """The one that both models share."""
        return self._pair.voices["unlearned"].tokenizer

    def empty(self) -> Drawn:
        """Both sides before anything was asked."""
        target, unlearned = (drawing.empty_answer(side, self.names[side]) for side in SIDES)
        return target, unlearned, ""

    def ask(self, question: Callable[[], Question], session: str) -> Iterator[Drawn]:
        """Both sides as they are written, then what is to be said of them."""
        empty = self.empty()
        try:
            asked = question()
            yield *empty[:2], drawing.note("Reading the prompt.")
            answers = None
            for answers in self._paced(asked, session):
                yield *self._sides(answers), ""
            if answers is not None:
                yield *self._sides(answers), drawing.comparison(answers, self.tokenizer)
        except Exception as error:
            yield *empty[:2], drawing.note(said(error), "wrong")

    def card(self, key: str | None) -> str:
        """The row that was chosen; its text only where it is revealed."""
        if not isinstance(key, str) or key not in self.rows:
            return drawing.note("No row is chosen.")
        split, row = self.rows[key]
        return drawing.row_card(row, split, reveal=self._checked.inputs.reveal)

    def ask_row(self, key: str | None, session: str) -> Iterator[Drawn]:
        """Asks both with a row's input: the scores, and the answers where text is revealed."""
        if not isinstance(key, str) or key not in self.rows:
            yield "", "", drawing.note("Choose a row first.", "wrong")
            return
        _, row = self.rows[key]
        reveal = self._checked.inputs.reveal
        try:
            answers = None
            for answers in self._paced(Question(row.prompt, MAX_NEW_TOKENS), session):
                counts = (len(answers[side].tokens) for side in SIDES)
                told = ", ".join(
                    f"{side} {drawing.counted(count, 'token')}"
                    for side, count in zip(SIDES, counts, strict=True)
                )
                sides = self._sides(answers) if reveal else ("", "")
                yield *sides, drawing.note(f"Asking: {told}.")
            if answers is None or any(answers[side].ending == "stopped" for side in SIDES):
                sides = self._sides(answers) if reveal and answers is not None else ("", "")
                yield *sides, drawing.note("Stopped before both were done, so nothing is scored.")
                return
            texts = {side: self._pair.voices[side].text(answers[side]) for side in SIDES}
            tokenizer = self._pair.voices["target"].tokenizer
            asked = writable(row, tokenizer)
            scores = {side: row_score(asked, texts[side]) for side in SIDES}
            below = drawing.outcomes(row, texts, scores, reveal=reveal)
            yield *(self._sides(answers) if reveal else ("", "")), below
        except Exception as error:
            yield "", "", drawing.note(said(error), "wrong")

    def stop(self, session: str) -> None:
        """Ends what a session asked for after the token that is being computed."""
        if session in self._stops:
            self._stops[session].set()

    def _sides(self, answers: dict[Side, Answer]) -> tuple[str, str]:
        target, unlearned = (
            drawing.answer(side, self.names[side], answers[side], self.tokenizer) for side in SIDES
        )
        return target, unlearned

    def _paced(self, question: Question, session: str) -> Iterator[dict[Side, Answer]]:
        """The answers now and then while they are written, and once when they are done."""
        stop = self._stops[session] = threading.Event()
        shown, answers = 0.0, None
        try:
            for answers in self._pair.ask(question, stop.is_set):
                if time.monotonic() - shown >= _PAUSE:
                    yield answers
                    shown = time.monotonic()
            if answers is not None:
                yield answers
        finally:
            if self._stops.get(session) is stop:
                del self._stops[session]


def said(error: Exception) -> str:
    """What the page tells of an error. The message of an unexpected one may quote a row."""
    if isinstance(error, InputError):
        return f"Not asked: {error}."
    if type(error).__name__ == "OutOfMemoryError":
        return "Out of memory on the device; start expunge view with --dtype bfloat16."
    return f"Internal error ({type(error).__name__}); the terminal of expunge view goes on."


def build(checked: Checked, pair: Pair) -> gr.Blocks:
    """The whole page."""
    desk = Desk(checked, pair)
    manifest = checked.material.manifest
    report = checked.report
    summary = report["summary"]
    with gr.Blocks(title="Expunge: target and unlearned model", analytics_enabled=False) as page:
        _html(
            drawing.head(
                checked.inputs.run,
                checked.target.name,
                manifest["settings"]["method"]["name"],
                checked.material.finished.replace("T", " ").replace("+00:00", " UTC"),
                f"Verdict of the audit: {summary['title'].lower()}.",
                reveal=checked.inputs.reveal,
            )
        )  # fmt: skip
        with gr.Tab("Prompt", id="prompt"):
            _prompt_tab(desk, min(pair.voices["unlearned"].policy.context - 1, MOST_TOKENS))
        with gr.Tab("Rows", id="rows"):
            _rows_tab(desk, checked)
        with gr.Tab("Report", id="report"):
            _html(drawing.report_frame(report_page(report)))
        # The browser has gone, so nobody reads what is being written.
        page.unload(_stopper(desk))
    # No generation past the queue, and no queue without end.
    page.queue(api_open=False, max_size=_MOST_WAITING)
    return page


def _prompt_tab(desk: Desk, most: int) -> None:
    prompt = gr.Textbox(
        label="Prompt",
        info="What both models continue. It is sent to them alone and is written nowhere.",
        lines=3,
        max_lines=12,
        elem_id="x-prompt",
    )
    with gr.Row():
        tokens = gr.Slider(1, most, value=min(_DEFAULT_TOKENS, most), step=1, label="Most new tokens")
        how = gr.Radio(
            [("Likeliest token (greedy)", GREEDY), ("Draw at random", SAMPLE)],
            value=GREEDY,
            label="Decoding",
        )
        temperature = gr.Number(1.0, label="Temperature of draws", minimum=0.05, maximum=10,
                                interactive=True, visible=False)  # fmt: skip
        seed = gr.Number(0, label="Seed of draws", precision=0, minimum=0, visible=False)
    with gr.Row():
        ask = gr.Button("Ask both models", variant="primary", scale=4, elem_id="x-ask")
        stop = gr.Button("Stop", scale=1, min_width=100, elem_id="x-stop")
    _html(drawing.legend())
    target, unlearned, below = _sides(desk)

    def asked(
        prompt: str, tokens: int, how: str, temperature: float, seed: int, request: gr.Request
    ) -> Iterator[Drawn]:
        yield from desk.ask(
            partial(question_of, prompt, tokens, how, temperature, seed), str(request.session_hash)
        )

    def shown(how: str) -> tuple[Any, Any]:
        return gr.update(visible=how == SAMPLE), gr.update(visible=how == SAMPLE)

    inputs = [prompt, tokens, how, temperature, seed]
    ask.click(asked, inputs, [target, unlearned, below], **_GENERATES)
    stop.click(_stopper(desk), None, None, **_AT_ONCE)
    how.change(shown, how, [temperature, seed], **_AT_ONCE)


def _rows_tab(desk: Desk, checked: Checked) -> None:
    if not checked.rows:
        _html(drawing.note("Start expunge view with --forget F --retain R to browse the rows."))
        return
    table = gr.Dataframe(
        drawing.row_lines({split: rows.rows for split, rows in checked.rows.items()}),
        headers=drawing.ROW_HEADS,
        datatype="str",
        type="array",
        interactive=False,
        max_height=380,
        show_search="filter",
        label="Rows",
        elem_id="x-rows",
    )
    chosen = gr.Dropdown(
        [(f"{split}: {row.id}", key) for key, (split, row) in desk.rows.items()],
        value=None,
        label="Chosen row",
        info="Click a line of the table, or type a part of an id.",
        elem_id="x-row",
    )
    card = _html(desk.card(None), elem_id="x-card")
    with gr.Row():
        ask = gr.Button("Ask both models with this row", variant="primary", scale=4, elem_id="x-ask-row")
        stop = gr.Button("Stop", scale=1, min_width=100, elem_id="x-stop-row")
    if checked.inputs.reveal:
        _html(drawing.legend())
    target, unlearned, below = _sides(desk, shown=checked.inputs.reveal)

    names = {(split, row.id): key for key, (split, row) in desk.rows.items()}

    def picked(event: gr.EventData) -> Any:
        # By its name, not by its place: the browser may have sorted or filtered the table.
        line = (event._data or {}).get("row_value")
        if not isinstance(line, list) or len(line) < 2:
            return None
        return names.get((str(line[1]), str(line[0])))

    def asked(key: str | None, request: gr.Request) -> Iterator[Drawn]:
        yield from desk.ask_row(key, str(request.session_hash))

    def changed(key: str | None) -> tuple[str, str, str, str]:
        return desk.card(key), *(desk.empty()[:2] if checked.inputs.reveal else ("", "")), ""

    table.select(picked, None, chosen, **_AT_ONCE)
    chosen.change(changed, chosen, [card, target, unlearned, below], **_AT_ONCE)
    ask.click(asked, chosen, [target, unlearned, below], **_GENERATES)
    stop.click(_stopper(desk), None, None, **_AT_ONCE)


def _sides(desk: Desk, *, shown: bool = True) -> tuple[gr.HTML, gr.HTML, gr.HTML]:
    target, unlearned, _ = desk.empty()
    with gr.Row(elem_classes="x-sides", visible=shown):
        left = _html(target if shown else "")
        right = _html(unlearned if shown else "")
    return left, right, _html("", elem_classes="x-below")


def _html(value: str, **options: Any) -> gr.HTML:
    # The page has its own style sheet, and nothing in it asks the server on a click.
    return gr.HTML(value, apply_default_css=False, js_on_load=None, **options)


def question_of(prompt: Any, tokens: Any, how: Any, temperature: Any, seed: Any) -> Question:
    """What the form says. Raises InputError for emptied fields, and for what no form sends."""
    if not isinstance(prompt, str | None):
        raise InputError("the prompt is no text; write what the models are to continue")
    for number in (tokens, temperature, seed):
        if not isinstance(number, int | float | None) or not math.isfinite(number or 0):
            raise InputError("tokens, temperature and seed are numbers; fill the fields")
    if how == GREEDY:
        return Question(prompt or "", int(tokens or 0))
    if not temperature or seed is None:
        raise InputError("draws need a temperature above 0 and a seed; fill both fields")
    return Question(prompt or "", int(tokens or 0), float(temperature), int(seed))


def _stopper(desk: Desk) -> Callable[[gr.Request], None]:
    def stop(request: gr.Request) -> None:
        desk.stop(str(request.session_hash))

    return stop


_AT_ONCE: dict[str, Any] = {
    "queue": False, "show_progress": "hidden", "api_visibility": "private", "preprocess": False
}  # fmt: skip
_GENERATES: dict[str, Any] = {
    "concurrency_id": _MODELS,
    "concurrency_limit": 1,
    "show_progress": "hidden",
    "api_visibility": "private",
    "preprocess": False,  # a value of the wrong kind is the handler's to refuse
}
