"""A chat template that never ends is refused, and a right one is not."""

from __future__ import annotations

import copy
import sys
import time
from typing import Any

import pytest

from conftest import refusal
from expunge.data import chat_templates
from expunge.data.chat_templates import check_template, rendered, template_of
from expunge.data.tokenization import TextPolicy

_LOOPS = {
    "ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "what it is given": "{% set c = messages[0]['content'] %}"
    "{% for a in c %}{% for b in c %}{% for d in c %}{% endfor %}{% endfor %}{% endfor %}",
    "a macro of its own": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}"
    "{% endmacro %}{{ m(60) }}",
}


@pytest.mark.parametrize("name", _LOOPS)
def test_an_endless_template_is_refused(
    name: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_templates, "_SECONDS", 0.3)
    endless = copy.deepcopy(tokenizer)
    endless.chat_template = _LOOPS[name]
    started, traced = time.monotonic(), sys.gettrace()
    assert "the tokenizer's chat template goes on for 0.3 seconds; mend it" in refusal(
        lambda: check_template(endless)
    )
    assert time.monotonic() - started < 10
    assert sys.gettrace() is traced


def test_a_right_template_is_taken(tokenizer: Any) -> None:
    right = copy.deepcopy(tokenizer)
    right.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    check_template(right)


@pytest.mark.parametrize(
    "template",
    [
        "{{ strftime_now('%d %b %Y') }}",
        # Llama 3.2's way.
        "{% if not date_string is defined %}{% if strftime_now is defined %}"
        "{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{% endif %}{{ date_string }}",
    ],
)
def test_the_date_of_a_template_is_fixed_and_recorded(template: str, tokenizer: Any) -> None:
    dated = copy.deepcopy(tokenizer)
    dated.chat_template = template
    assert rendered(dated, [{"role": "user", "content": "Hi"}]) == "26 Jul 2024"
    on, off = (TextPolicy(9, chat_template=on).describe(dated) for on in (True, False))
    assert (on["date"], off["date"]) == ("2024-07-26", None)
    dated.chat_template = "{{ messages[0].content }}"
    assert TextPolicy(9, chat_template=True).describe(dated)["date"] is None


def test_a_choice_may_be_true_or_false() -> None:
    assert [template_of(given) for given in (True, False, "auto")] == ["on", "off", "auto"]
    wrong: Any = "yes"
    assert "give one of them" in refusal(lambda: template_of(wrong))
