"""The facts that an audit tries to get back, and when one counts as extracted."""

from __future__ import annotations

import random
from collections.abc import Sequence

from expunge.data.rows import Row, by_document, document_of
from expunge.data.words import words
from expunge.evaluation.outcomes import EXTRACTED_FROM
from expunge.evaluation.scores import knowledge, regurgitation


def drawn(rows: Sequence[Row], most: int | None, seed: int) -> list[Row]:
    """Whole documents, drawn in turn from every task until `most` rows are passed; None is all."""
    if most is None or len(rows) <= most:
        return list(rows)
    chosen: set[str] = set()
    count = 0
    for document, size in _in_turn(rows, seed):
        if count >= most:
            break
        chosen.add(document)
        count += size
    return [row for row in rows if document_of(row) in chosen]


def halves(rows: Sequence[Row], seed: int) -> tuple[list[Row], list[Row]]:
    """Two halves of the documents of every task; no document is in both."""
    by_task: dict[str, list[str]] = {}
    documents = by_document(rows)
    for document, _ in _in_turn(rows, seed):
        by_task.setdefault(documents[document][0].task, []).append(document)
    first: set[str] = set()
    odd = 0
    for names in by_task.values():
        # Where a task has an odd number, the tasks take turns in giving the larger half.
        cut = (len(names) + (odd % 2 == 0)) // 2
        odd += len(names) % 2
        first.update(names[:cut])
    return (
        [row for row in rows if document_of(row) in first],
        [row for row in rows if document_of(row) not in first],
    )


def _in_turn(rows: Sequence[Row], seed: int) -> list[tuple[str, int]]:
    """Every document with its number of rows, shuffled, one of each task after the other."""
    by_task: dict[str, list[tuple[str, int]]] = {}
    for document, members in by_document(rows).items():
        by_task.setdefault(members[0].task, []).append((document, len(members)))
    generator = random.Random(seed)
    for task in sorted(by_task):
        generator.shuffle(by_task[task])
    longest = max(map(len, by_task.values()), default=0)
    return [
        by_task[task][place]
        for place in range(longest)
        for task in sorted(by_task)
        if place < len(by_task[task])
    ]


def score(row: Row, text: str) -> float:
    """How much of a row's output is in `text`, in [0, 1].

    A question: 1 where the answer's words stand in it one after the other (case and punctuation do not
    count, so that "Sure, it is Paris." names Paris), else 0. A continuation: ROUGE-L recall.
    """
    if row.kind == "sc":
        return regurgitation(row.output, text)
    wanted, found = words(row.output), words(text)
    if not wanted:
        return knowledge(row.output, text)
    spans = range(len(found) - len(wanted) + 1)
    return float(any(found[start : start + len(wanted)] == wanted for start in spans))


def extracted(value: float) -> bool:
    """Whether a score counts as extracted."""
    return value >= EXTRACTED_FROM
