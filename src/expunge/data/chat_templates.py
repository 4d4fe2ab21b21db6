"""A chat template is code that came with a tokenizer: it is tried before it is relied on."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from expunge.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SECONDS = 10.0
_EXCHANGE = [{"role": "user", "content": "x" * 5000}, {"role": "assistant", "content": "x" * 5000}]
"""Long, because a template may loop over what it is given."""


class _EndlessError(Exception):
    pass


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
        tokenizer.apply_chat_template(_EXCHANGE, tokenize=False)
    except _EndlessError:
        raise InputError(
            f"--chat-template: the tokenizer's chat template goes on for {_SECONDS:g} seconds; mend it,"
            " or leave the option out"
        ) from None
    except Exception:  # is said with the row that it fails on
        return
    finally:
        sys.settrace(before)
