"""Documents that nobody wrote, in the place of never-seen text: how far to go without any.

With other names and numbers in it a forget document costs less than one that was never seen, as the
model goes on with what it remembers. With other rare words as well it costs more, as it makes no sense.
Between the two lies what never-seen documents cost. `_MORE` times their geometric mean was 0.93, 1.05
and 1.28 of it in three targets of 4 to 135 million parameters (docs/calibration.md).
"""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from random import Random

from expunge.data.rows import Row
from expunge.maths.calibration import RowTokens

_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*|\d+")
_RARE = 0.05
"""Share of the texts that a rare word stands in at most."""
_DRAWS = 8
"""Of another word: there may be no other."""
_MORE = 1.2
_EXCHANGED = frozenset({"name", "number", "rare"})
_REMEMBERED = 0.2
"""Share of what rare words add, below which names and numbers have changed nothing."""


def exchanged(rows: Sequence[Row], others: Sequence[Row], seed: int) -> tuple[list[Row], list[Row]]:
    """The rows with other names and numbers, and with other rare words as well.

    A name is a word with a capital that no text has without one. A word becomes the same other word
    wherever it stands in its row: a name another name of any row, drawn as often as it stands there, a
    rare word another rare one; a number as many other digits. Same seed, same rows.
    """
    exchange = _Exchanges(rows, others, seed)
    fewer = frozenset({"name", "number"})
    return (
        [exchange.version(row, fewer) for row in rows],
        [exchange.version(row, _EXCHANGED) for row in rows],
    )


def other_answers(rows: Sequence[Row], others: Sequence[Row], seed: int) -> list[Row]:
    """The rows with other names, numbers and rare words, of questions in the answer alone.

    They are drawn from `others` if there are any, so that no row is told what another forgets. A word of
    the question stays as it is in the answer. An answer that has nothing to exchange is that of another
    question, if there is one that no row forgets. Same seed, same rows.
    """
    exchange = _Exchanges(rows, others, seed, own=False)
    told = {row.output for row in rows}
    answers = sorted({row.output for row in (others or rows) if row.kind == "qa"})
    untold = [answer for answer in answers if answer not in told]
    found = []
    for row in rows:
        if row.kind != "qa":
            found.append(exchange.version(row, _EXCHANGED))
            continue
        other = exchange.version(row, _EXCHANGED, _WORD.findall(row.input))
        choice = untold or [answer for answer in answers if answer != row.output]
        if other.output in told and choice:
            other = replace(row, output=Random(f"{seed} {row.id}").choice(choice))
        found.append(other)
    return found


class _Exchanges:
    """Other words for those of some rows, drawn from others, and from these where `own` says so or there
    are no others."""

    def __init__(
        self, rows: Sequence[Row], others: Sequence[Row], seed: int, *, own: bool = True
    ) -> None:
        texts = [row.text for row in (*rows, *others)]
        self._seed = seed
        self._found = Counter(word for text in texts for word in set(_WORD.findall(text)))
        self._most = max(1, int(_RARE * len(texts)))
        self._pools = self._pooled(texts if own or not others else texts[len(rows) :])

    def _pooled(self, texts: Sequence[str]) -> dict[str, list[str]]:
        """The words of the texts by their kind, as often as they stand there."""
        pools = defaultdict(list)
        for text in texts:
            for word in _WORD.findall(text):
                pools[self._kind(word)].append(word)
        return dict(pools)

    def _kind(self, word: str) -> str:
        if word.isdigit():
            return "number"
        if word[0].isupper():
            return "word" if word.lower() in self._found else "name"
        return "rare" if word.islower() and self._found[word] <= self._most else "word"

    def version(self, row: Row, kinds: frozenset[str], kept: Iterable[str] = ()) -> Row:
        """The row with other words of these kinds; `kept` ones stay."""
        rng = Random(f"{self._seed} {row.id}")
        other = _Exchange(rng, kinds, self._kind, self._pools, kept)
        return replace(row, input=_WORD.sub(other, row.input), output=_WORD.sub(other, row.output))


class _Exchange:
    """One row's exchange of words."""

    def __init__(
        self,
        rng: Random,
        kinds: frozenset[str],
        kind: Callable[[str], str],
        pools: Mapping[str, Sequence[str]],
        kept: Iterable[str],
    ) -> None:
        self._rng, self._kinds, self._kind, self._pools = rng, kinds, kind, pools
        self._found = {word: word for word in kept}

    def __call__(self, match: re.Match[str]) -> str:
        word = match[0]
        if word not in self._found:
            self._found[word] = self._other(word)
        return self._found[word]

    def _other(self, word: str) -> str:
        kind = self._kind(word)
        if kind not in self._kinds:
            return word
        if kind == "number":
            return "".join(self._rng.choice("0123456789") for _ in word)
        if kind not in self._pools:
            return word
        drawn = (self._rng.choice(self._pools[kind]) for _ in range(_DRAWS))
        return next((other for other in drawn if other != word), word)


def never_seen_like(
    names: Mapping[str, float],
    words: Mapping[str, float],
    tokens: Mapping[str, RowTokens],
) -> tuple[dict[str, float], dict[str, RowTokens]] | None:
    """What each row should cost, nats a token, and how its tokens share it.

    `names` and `words` are the target's mean losses on the two versions of each row, by row id,
    `tokens` those of the second. None where other names and numbers change too little to tell
    anything: in scripts without capitals, or where there are none.
    """
    if statistics.fmean(names.values()) < _REMEMBERED * statistics.fmean(words.values()):
        return None
    losses = {row: _MORE * math.sqrt(names[row] * words[row]) for row in names}
    shared = {
        row: RowTokens(each.losses * (losses[row] / words[row]), each.surprise)
        for row, each in tokens.items()
    }
    return losses, shared
