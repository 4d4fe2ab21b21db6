"""The largest batches of a run, by token counts alone: its own order, cut as its own loop cuts it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import cast

from expunge.data.batches import Batch, collate
from expunge.data.sampling import step_batches
from expunge.data.tokenization import Example
from expunge.methods.base import Context
from expunge.training.loop import micro_batches, part
from expunge.training.preparation import Prepared

_EPOCHS = 100
"""Epochs whose batches are looked at; those of more would hardly be larger."""
Lengths = Sequence[int]
Part = tuple[Batch, Batch | None]


@dataclass(frozen=True)
class Largest:
    """The largest parts of any step."""

    parts: Sequence[Part]
    """By tokens, and by tokens with padding where that is another part: forget and retain side."""
    retain: Batch | None
    """The largest whole batch of the retain side."""
    accumulates: bool
    """Whether steps run in several parts, so that gradients are there while a part runs."""
    sizes: int
    """How many different sizes the passes of all steps have."""
    row_lengths: int
    """How many different lengths their rows have."""


def largest_batches(prepared: Prepared, pass_tokens: int | None) -> Largest:
    """`pass_tokens` are those of a packed pass; None where rows are padded."""
    best: dict[Callable[[Lengths], int], tuple[int, list[list[int]]]] = {}
    curvature: tuple[int, list[int]] = (-1, [])
    accumulates = False
    sizes: set[tuple[int, ...]] = set()
    seen: set[int] = set()
    rows = (prepared.forget, prepared.retain)
    for step in _batches(prepared, by_length=pass_tokens is None):
        sides = [indices for indices in step if indices]
        lengths = [_lengths(side, of) for side, of in zip(sides, rows, strict=False)]
        if len(sides) > 1:
            curvature = max(curvature, (padded_tokens(lengths[1]), sides[1]))
        count = micro_batches(lengths, prepared.used["micro_batch_size"], pass_tokens)
        accumulates |= count > 1
        seen.update(*lengths)
        for index in range(count):
            cut = [side[part(len(side), index, count)] or side[:1] for side in sides]
            sizes |= pass_sizes(
                [_lengths(side, of) for side, of in zip(cut, rows, strict=False)],
                packed=pass_tokens is not None,
            )
            for size in (tokens, padded_tokens):
                value = sum(size(_lengths(side, of)) for side, of in zip(cut, rows, strict=False))
                if value > best.get(size, (-1, []))[0]:
                    best[size] = (value, cut)
    chosen = [cut for _, cut in best.values()]
    return Largest(
        [
            (
                collate(prepared.forget, cut[0], prepared.pad_id),
                collate(prepared.retain, cut[1], prepared.pad_id) if len(cut) > 1 else None,
            )
            for number, cut in enumerate(chosen)
            if cut not in chosen[:number]
        ],
        collate(prepared.retain, curvature[1], prepared.pad_id) if curvature[1] else None,
        accumulates,
        len(sizes),
        len(seen),
    )


def pass_sizes(sides: Sequence[Lengths], *, packed: bool) -> set[tuple[int, ...]]:
    """Sizes of the passes over some sides: of one for all where rows are packed, or of one each."""
    if packed:
        return {(sum(map(sum, sides)),)}
    return {(len(lengths), max(lengths)) for lengths in sides if lengths}


def _batches(prepared: Prepared, *, by_length: bool) -> Iterator[tuple[list[int], list[int]]]:
    """Numbers of the forget and the retain rows of every step."""
    used, sampling = prepared.used, prepared.method.sampling
    seeded = cast("Context", SimpleNamespace(seed=prepared.options.seed))
    forget, retain = step_batches(
        prepared.forget,
        prepared.retain,
        used["batch_size"],
        prepared.pad_id,
        partial(Context.generator, seeded),
        sampling,
        used["steps"],
        by_length=by_length,
    )
    for step in range(1, min(used["steps"], _EPOCHS * used["steps_per_epoch"]) + 1):
        yield forget.indices(step), [] if retain is None else retain.indices(step)


def _lengths(indices: Sequence[int], rows: Sequence[Example]) -> list[int]:
    return [len(rows[index]) for index in indices]


def tokens(lengths: Lengths) -> int:
    """Of rows side by side."""
    return sum(lengths)


def padded_tokens(lengths: Lengths) -> int:
    """Of rows that are padded to the longest."""
    return len(lengths) * max(lengths)


def longest(examples: Sequence[Example], count: int) -> list[Example]:
    """So many of the longest examples."""
    return sorted(examples, key=len)[-count:]


def shortest(examples: Sequence[Example], count: int) -> list[Example]:
    """So many of the shortest examples."""
    return sorted(examples, key=len)[:count]
