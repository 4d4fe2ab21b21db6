"""A chat template that never ends is refused, and a right one is not."""

from __future__ import annotations

import copy
import sys
import time
from typing import Any

import pytest

from conftest import refusal
from expunge.data import chat_templates
from expunge.data.chat_templates import check_template

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
