"""A chat template is code that came with a tokenizer: it is tried before it is relied on.

What it writes must not change from day to day, so that the date that it can ask for is a fixed one.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from datetime import date
from typing import TYPE_CHECKING, Any, Literal

from expunge.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Template = Literal["auto", "on", "off"]
"""Whether rows are rendered with the chat template; auto: where the model answers better with it."""
DATE = date(2024, 7, 26)
"""Today, to a template; Llama 3.1's writes this date where it is given none."""
_CLOCK = "strftime_now"
_NOW = (
    f"{{% macro {_CLOCK}(form) %}}{{{{ form"
    + "".join(f"|replace('%{c}', '{DATE.strftime('%' + c)}')" for c in "aAbBcdeDFHIjmMpSTuUwWxXyY")
    + " }}{% endmacro %}"
)
"""Stands before a template that asks for the date, for transformers hands no function on to it."""
_SECONDS = 10.0
_EXCHANGE = [{"role": "user", "content": "x" * 5000}, {"role": "assistant", "content": "x" * 5000}]
"""Long, because a template may loop over what it is given."""


class _EndlessError(Exception):
    pass


def template_of(given: Template | bool) -> Template:
    """The choice that was given; True and False stand for on and off. Raises InputError."""
    if isinstance(given, bool):
        return "on" if given else "off"
    if given not in ("auto", "on", "off"):
        raise InputError(f"chat_template {given!r}: is none of auto, on and off; give one of them")
    return given


def rendered(
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[Mapping[str, str]],
    *,
    add_generation_prompt: bool = False,
) -> str:
    """The turns, of a `role` and a `content` each, as the tokenizer's chat template writes them."""
    text = tokenizer.apply_chat_template(
        list(turns),
        chat_template=dated(tokenizer),
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
    )
    return str(text)


def dated(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The template with the fixed date in it; None where it asks for none."""
    return _NOW + tokenizer.get_chat_template() if date_in(tokenizer) else None


def date_in(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The date that the template is told; None where it asks for none."""
    return DATE.isoformat() if _CLOCK in str(tokenizer.chat_template) else None


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Renders an exchange. Raises InputError where the template goes on for 10 seconds."""
    until = time.monotonic() + _SECONDS

    def watch(_frame: Any, _event: str, _argument: Any) -> Any:
        if time.monotonic() > until:
            raise _EndlessError
        return watch

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        rendered(tokenizer, _EXCHANGE)
    except _EndlessError:
        raise InputError(
            f"--chat-template: the tokenizer's chat template goes on for {_SECONDS:g} seconds; mend it,"
            " or give --chat-template off"
        ) from None
    except Exception:  # is said with the row that it fails on
        return
    finally:
        sys.settrace(before)
