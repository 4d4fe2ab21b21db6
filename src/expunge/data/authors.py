"""Authors of TOFU (arXiv 2401.06121): twenty questions each, in order, and no column that names them.

A file counts as such if its rows come in blocks of twenty and names show that: in nine of ten blocks
some name is in most rows, in the other blocks less often than here, and not in the rows beside it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

QUESTIONS = 20
"""An author's rows."""
_NAMED = 14
"""Rows of a block that must hold its name."""
_BLOCKS = 0.9
"""Share of the blocks that must have a name of their own; two authors may share theirs."""
_INSIDE = re.compile(r"(?<=[\w,] )[^\W\d_]{2,}")
"""Words that do not begin a sentence."""


def in_blocks_of_authors(texts: Sequence[str]) -> bool:
    """Whether each twenty of the texts, one after another, are about somebody else."""
    if len(texts) % QUESTIONS or len(texts) < 2 * QUESTIONS:
        return False
    names = [{word for word in _INSIDE.findall(text) if word[0].isupper()} for text in texts]
    everywhere = Counter(name for text in names for name in text)
    found = 0
    for start in range(0, len(texts), QUESTIONS):
        end = start + QUESTIONS
        here = Counter(name for text in names[start:end] for name in text)
        # Where blocks are of another length, a name goes on beyond the border.
        beside = {
            name for text in (*names[max(0, start - 1) : start], *names[end : end + 1]) for name in text
        }
        found += any(
            n >= _NAMED and 2 * n > everywhere[name] and name not in beside for name, n in here.items()
        )
    return found >= _BLOCKS * len(texts) / QUESTIONS


def author_of(position: int) -> int:
    """The number of the author, from 1, of the row at a position, from 0."""
    return position // QUESTIONS + 1
