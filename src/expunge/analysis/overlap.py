"""Retain rows that overlap with the forget set: near repeats, the same document, the same subject.

A near repeat holds much of what a forget row says, so keeping it keeps that too. Containment is the
share of the shorter text's runs of five normalised words that the other holds; it is counted exactly,
over an index of all runs. Broder, "On the resemblance and containment of documents", 1997.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from expunge.data.rows import Row, by_document, document_of
from expunge.data.words import words

Reason = Literal["near repeat", "same document", "same subject"]

RUN = 5
"""Words of a run."""
CONTAINMENT = 0.5
"""Share of the shorter text's runs from which a row is a near repeat."""
RARE = 3
"""A subject is rare where so many documents of a set name it at most."""
_LISTED = 10
_CAPITALISED = r"[^\W\d_a-z][\w'-]*[^\W\d_A-Z][\w'-]*"
_PARTICLE = r"(?:de|van|von|der|den|du|la|le|di|da|del|bin|ibn|al)"
_NAME = re.compile(rf"{_CAPITALISED}(?: (?:{_PARTICLE} )*{_CAPITALISED})+")
_OPENERS = frozenset(
    word.capitalize()
    for word in re.findall(
        r"\w+",
        "a an and as at before but by did do does during for from has have he her his how if in is it"
        " its no of on or she since that the their there these they this those to was were what when"
        " where which while who whom whose why with",
    )
)
"""Words that open a sentence and are no part of a name."""


@dataclass(frozen=True)
class Overlap:
    """One retain row and the forget rows that it overlaps with, for one reason."""

    retain: str
    """Id of the retain row."""
    reason: Reason
    forget: tuple[str, ...]
    """Ids of the forget rows, at most ten."""
    count: int
    """How many there are."""
    containment: float | None = None
    """The largest, in [0, 1]; of near repeats only."""
    jaccard: float | None = None
    """Shared runs over all runs of the same two rows; of near repeats only."""
    subjects: tuple[str, ...] = field(default=(), repr=False)
    """What is named on both sides: text of rows, to be shown with --reveal only."""


def overlaps(forget: Sequence[Row], retain: Sequence[Row]) -> list[Overlap]:
    """Every overlap, in the order of the retain rows."""
    found = [
        *near_repeats(forget, retain),
        *same_documents(forget, retain),
        *same_subjects(forget, retain),
    ]
    order = {row.id: place for place, row in enumerate(retain)}
    return sorted(found, key=lambda overlap: order[overlap.retain])


def near_repeats(forget: Sequence[Row], retain: Sequence[Row]) -> Iterator[Overlap]:
    """Retain rows whose words nearly repeat a forget row's, or a part that is one row."""
    of_forget = [runs(row.text) for row in forget]
    index: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for place, held in enumerate(of_forget):
        for run in held:
            index[run].append(place)
    for row in retain:
        held = runs(row.text)
        shared = Counter(place for run in held for place in index.get(run, ()))
        found = []
        for place, count in shared.items():
            share = count / min(len(held), len(of_forget[place]))
            if share >= CONTAINMENT:
                jaccard = count / (len(held) + len(of_forget[place]) - count)
                found.append((-share, -jaccard, place))
        if found:
            found.sort()
            ids = [forget[place].id for _, _, place in found]
            yield _listed(row, "near repeat", ids, containment=-found[0][0], jaccard=-found[0][1])


def same_documents(forget: Sequence[Row], retain: Sequence[Row]) -> Iterator[Overlap]:
    """Retain rows that are of a document with forget rows."""
    of_forget = by_document(forget)
    for row in retain:
        if same := of_forget.get(document_of(row)):
            yield _listed(row, "same document", [other.id for other in same])


def same_subjects(forget: Sequence[Row], retain: Sequence[Row]) -> Iterator[Overlap]:
    """Rows of documents that name the subject of a document on the other side.

    A document's subject is a name of two words or more with which a row's text begins and that stands in
    every other row, or in half of them. Names that many documents carry (a state, a title) are no one.
    """
    sides = [by_document(rows) for rows in (forget, retain)]
    named = [{key: _names_of(rows) for key, rows in side.items()} for side in sides]
    counts = [Counter(name for names in side.values() for name in names) for side in named]
    rare = {name for name in counts[0] if counts[0][name] <= RARE and 0 < counts[1][name] <= RARE}
    subjects = [
        {key: _subjects(rows, names[key] & rare) for key, rows in side.items()}
        for side, names in zip(sides, named, strict=True)
    ]
    holders: dict[str, list[str]] = defaultdict(list)
    for key, names in named[0].items():
        for name in names & rare:
            holders[name].append(key)
    for key, rows in sides[1].items():
        shared: dict[str, list[Row]] = defaultdict(list)
        for name in sorted(named[1][key] & rare):
            for other in holders[name]:
                if name in subjects[1][key] or name in subjects[0][other]:
                    shared[name] += sides[0][other]
        for row in rows:
            mine = tuple(name for name in shared if name in names_in(row.text))
            ids = dict.fromkeys(other.id for name in mine for other in shared[name])
            if mine:
                yield _listed(row, "same subject", list(ids), subjects=mine)


def runs(text: str) -> set[tuple[str, ...]]:
    """Every run of five words, or the whole of a shorter text: NFKC, case folded, "_" parts words."""
    found = words(unicodedata.normalize("NFKC", text).casefold().replace("_", " "))
    size = min(RUN, len(found))
    return {tuple(found[start : start + size]) for start in range(len(found) - size + 1)}


def names_in(text: str) -> dict[str, int]:
    """Names of two words or more, case folded, with where each begins first."""
    plain = unicodedata.normalize("NFKC", text).replace("’", "'")
    found: dict[str, int] = {}
    for match in _NAME.finditer(plain):
        parts = [(p.group(), match.start() + p.start()) for p in re.finditer(r"\S+", match.group())]
        while parts and parts[0][0] in _OPENERS:
            parts = parts[1:]
        if len(parts) >= 2:
            name = " ".join(re.sub(r"'s?$", "", part) for part, _ in parts).casefold()
            found.setdefault(name, parts[0][1])
    return found


def _names_of(rows: Iterable[Row]) -> set[str]:
    return {name for row in rows for name in names_in(row.text)}


def _subjects(rows: Sequence[Row], candidates: set[str]) -> set[str]:
    if not candidates:
        return set()
    names: list[Mapping[str, int]] = [names_in(row.text) for row in rows]
    return {
        name
        for name in candidates
        if any(found.get(name) == 0 for found in names)
        and 2 * sum(name in found for found in names) >= len(rows)
    }


def _listed(
    row: Row,
    reason: Reason,
    ids: Sequence[str],
    *,
    containment: float | None = None,
    jaccard: float | None = None,
    subjects: tuple[str, ...] = (),
) -> Overlap:
    return Overlap(row.id, reason, tuple(ids[:_LISTED]), len(ids), containment, jaccard, subjects)
