"""A step's batches cut into parts that fit in memory, without a change of the step's loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from expunge.data.batches import Batch


def micro_batches(sides: Sequence[Sequence[int]], rows: int | None, tokens: int | None) -> int:
    """How many parts a step is cut into so that one holds so many rows a side and tokens at most.

    `sides` are the lengths of each side's rows. Rows are not cut, so a part may hold more tokens.
    """
    counts = [1]
    if rows is not None:
        counts += [-(-len(side) // rows) for side in sides]
    if tokens is not None:
        counts.append(-(-sum(map(sum, sides)) // tokens))
    return min(max(counts), max(map(len, sides)))


def part(rows: int, index: int, count: int) -> slice:
    """Which rows of a side are in part `index` of `count`."""
    return slice(rows * index // count, rows * (index + 1) // count)


def parts(batch: Batch, count: int, size: Callable[[Batch], float]) -> list[tuple[Batch, float]]:
    """The batch cut into `count` parts, each with its share of what a mean over it is taken over.

    A batch of fewer rows than parts gives idle rows of share 0, for a loss must be given one.
    """
    if count == 1:
        return [(batch, 1.0)]
    whole = size(batch)
    rows = len(batch.examples)
    cuts = []
    for index in range(count):
        chosen = part(rows, index, count)
        if chosen.start == chosen.stop:
            cuts.append((batch.idle(), 0.0))
        else:
            cut = batch.rows(chosen.start, chosen.stop)
            cuts.append((cut, size(cut) / (whole or 1)))
    return cuts
