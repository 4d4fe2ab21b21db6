"""How much of an answer a model knows by heart, from one teacher-forced pass, as pure functions.

`right` says of every token of the answer whether it is the likeliest after the prompt and the tokens
of the answer before it. An end of text is no part of the answer.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

MEMORISATION = ("extraction_strength", "exact_memorisation")
"""What the two are called in records and score files."""


def extraction_strength(right: Sequence[bool]) -> float:
    """1 - k / n, where after the first k of n tokens greedy decoding writes the rest without a mistake.

    0: not even the last one; 1: all of them. arXiv 2406.09179.
    """
    wrong = [place for place, token in enumerate(right) if not token]
    return 1.0 - ((wrong[-1] + 1) / len(right) if wrong else 0.0)


def exact_memorisation(right: Sequence[bool]) -> float:
    """Share of the tokens that are right, in [0, 1]; arXiv 2406.09179."""
    return sum(right) / len(right)


def memorisation(right: Sequence[bool]) -> dict[str, float | None]:
    """Both by name; None where no token was read."""
    if not right:
        return dict.fromkeys(MEMORISATION)
    values = (extraction_strength(right), exact_memorisation(right))
    return dict(zip(MEMORISATION, values, strict=True))


def mean_memorisation(records: Iterable[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Means of both over the records of rows; None where no row has it."""
    records = list(records)
    means: dict[str, float | None] = {}
    for name in MEMORISATION:
        values = [value for record in records if (value := record[name]) is not None]
        means[name] = statistics.fmean(values) if values else None
    return means
