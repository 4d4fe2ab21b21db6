"""Whether a file that is to be handed out holds text of rows."""

from __future__ import annotations

import html
import json
import unicodedata
from collections.abc import Iterable
from typing import Literal

from expunge.data.rows import Row

_NORMAL: tuple[Literal["NFC", "NFD", "NFKC", "NFKD"], ...] = ("NFC", "NFD", "NFKC", "NFKD")
SHORTEST = 12
"""Characters from which a text is searched for: a shorter one, such as a town, stands anywhere."""


def rows_in(content: bytes, rows: Iterable[Row]) -> list[str]:
    """Ids of the rows whose input or output is in the file: as it is, in JSON, or in HTML.

    A model may have written it in another Unicode form than the row has.
    """
    found = []
    for row in rows:
        texts = [text.strip() for text in (row.input, row.output)]
        long = [text for text in texts if len(text) >= SHORTEST]
        long += [unicodedata.normalize(form, text) for text in long for form in _NORMAL]
        forms = {form for text in long for form in _forms(text)}
        if any(form in content for form in forms):
            found.append(row.id)
    return found


def _forms(text: str) -> set[bytes]:
    escaped = html.escape(text)
    # Jinja writes quotes as numbers, the standard library one of them in hexadecimal.
    numbered = escaped.replace("&#x27;", "&#39;").replace("&quot;", "&#34;")
    written = {text, escaped, numbered, html.escape(text, quote=False)}
    written |= {json.dumps(text, ensure_ascii=plain)[1:-1] for plain in (True, False)}
    return {form.encode() for form in written}
