"""Which rows each step of a run takes: in a seeded order, of similar length, some more often."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from expunge.data.batches import Batch, collate
from expunge.data.tokenization import Example

_UNIT = 2**20
"""Parts that a row's weight is counted in."""
_POOL = 16
"""Batches whose rows are sorted by length together: enough to save padding, yet random."""


@dataclass(frozen=True)
class Sampling:
    """How a method draws its rows, beside the batch size."""

    retain_ratio: int = 1
    """Retain rows of a step for each forget row."""
    chunk_size: int | None = None
    """Forget rows of a chunk; chunks follow each other. None: all rows are one."""
    rounds: int = 1
    """Times that the chunks are gone through, each with its part of the epochs."""
    written_ratio: float = 0.0
    """Rows of a step that the target wrote (`own_text`), for each retain row. 0: it writes none, and all
    rows of random tokens have their turn in each pass over the retain rows."""


def epoch_order(
    lengths: Sequence[int], batch_size: int, generator: torch.Generator, *, by_length: bool = True
) -> list[list[int]]:
    """One epoch's batches of indices, shuffled; `by_length` sorts inside pools of 16 batches."""
    shuffled = torch.randperm(len(lengths), generator=generator).tolist()
    if not by_length:
        return [shuffled[i : i + batch_size] for i in range(0, len(shuffled), batch_size)]
    pool = batch_size * _POOL
    batches = []
    for start in range(0, len(shuffled), pool):
        ordered = sorted(shuffled[start : start + pool], key=lambda index: lengths[index])
        batches += [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def extra_rounds(weights: Sequence[float]) -> tuple[int, int, list[int]]:
    """Rounds of rows that an epoch has on top of the one that takes all, rows a round, shares of them.

    A row of weight w is taken w times an epoch on average: once with all, and in each round with
    probability (w - 1) / rounds, at most 1, so that no round holds a row twice. The shares are whole
    numbers in proportion to w - 1, for `systematic_sample`. Raises ValueError for a weight below 1.
    """
    if min(weights, default=1.0) < 1:
        raise ValueError("a weight is below 1: every row is taken at least once an epoch")
    rounds = math.ceil(max(weights, default=1.0) - 1)
    shares = [round((weight - 1) * _UNIT) for weight in weights]
    rows = sum(shares) // (rounds * _UNIT) if rounds else 0
    return (rounds if rows else 0), rows, shares


def systematic_sample(shares: Sequence[int], count: int, generator: torch.Generator) -> list[int]:
    """`count` different indices, each with probability count * share / sum(shares), which is 1 at most.

    Systematic sampling over a random order (Madow, 1949): one draw, then equal steps. In whole numbers,
    so that there are always `count`.
    """
    order = torch.randperm(len(shares), generator=generator)
    ordered = torch.tensor(shares)[order]
    total = int(ordered.sum())
    offset = int(torch.randint(total, (), generator=generator))
    ends = (ordered.cumsum(0) * count + offset) // total
    begins = torch.cat([torch.zeros(1, dtype=torch.long), ends[:-1]])
    return sorted(order[ends > begins].tolist())


class StepBatches(ABC):
    """One side's batch of every step."""

    def __init__(self, examples: Sequence[Example], pad_id: int) -> None:
        self._examples, self._pad_id = examples, pad_id

    @abstractmethod
    def indices(self, step: int) -> list[int]:
        """Positions of the rows of a step, counted from 1."""

    def at(self, step: int) -> Batch:
        """The batch of a step, counted from 1."""
        return collate(self._examples, self.indices(step), self._pad_id)


class EpochBatches(StepBatches):
    """The batch of any step, a new order every epoch; a function of the seed and the step alone.

    Rows of a weight above 1 are taken more than once an epoch, never twice in a batch.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        pad_id: int,
        generator: Callable[[int], torch.Generator],
        *,
        by_length: bool = True,
    ) -> None:
        """`generator` gives that of an epoch; `by_length` puts rows of similar length together."""
        super().__init__(examples, pad_id)
        self._batch_size, self._generator, self._by_length = batch_size, generator, by_length
        self._rounds, self._extra, self._shares = extra_rounds([e.weight for e in examples])
        self._epoch = -1
        self._order: list[list[int]] = []

    @property
    def batches_an_epoch(self) -> int:
        """The same in every epoch."""
        extra = self._rounds * -(-self._extra // self._batch_size)
        return -(-len(self._examples) // self._batch_size) + extra

    def indices(self, step: int) -> list[int]:
        """Positions of the rows of a step, counted from 1."""
        epoch, position = divmod(step - 1, self.batches_an_epoch)
        if epoch != self._epoch:
            self._order = self._epoch_order(self._generator(epoch))
            self._epoch = epoch
        return self._order[position]

    def _epoch_order(self, generator: torch.Generator) -> list[list[int]]:
        lengths = [len(example) for example in self._examples]
        size, by_length = self._batch_size, self._by_length
        batches = epoch_order(lengths, size, generator, by_length=by_length)
        if not self._rounds:
            return batches
        for _ in range(self._rounds):
            chosen = systematic_sample(self._shares, self._extra, generator)
            order = epoch_order([lengths[i] for i in chosen], size, generator, by_length=by_length)
            batches += [[chosen[i] for i in batch] for batch in order]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


class BesideRandom(StepBatches):
    """Batches of the user's rows, and in each the same share of the rows that no set lists.

    Sorted by length together, rows of random tokens, which are all of one length, would fill batches of
    their own, and in those steps nothing of the user's would be held. All of them have their turn
    before one comes again.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        pad_id: int,
        generator: Callable[[str], torch.Generator],
        *,
        by_length: bool = True,
        beside: int | None = None,
    ) -> None:
        """`batch_size` counts the user's rows, of which there is at least one, `beside` the others of a
        step; None: an even share of them. `generator` gives that of a purpose."""
        super().__init__(examples, pad_id)
        self._generator = generator
        self._listed = [i for i, example in enumerate(examples) if example.listed]
        self._others = [i for i, example in enumerate(examples) if not example.listed]
        self._batches = EpochBatches(
            [examples[index] for index in self._listed],
            batch_size,
            pad_id,
            lambda epoch: generator(f"retain order of epoch {epoch}"),
            by_length=by_length,
        )
        self._steps = -(-len(self._listed) // batch_size)
        self._beside = None if beside is None else min(beside, len(self._others))
        self._turns: dict[int, list[int]] = {}

    def indices(self, step: int) -> list[int]:
        """Positions of the rows of a step, counted from 1."""
        count = len(self._others)
        if self._beside is None:
            begin, end = (count * place // self._steps for place in (step - 1, step))
        else:
            begin, end = ((step - 1) * self._beside, step * self._beside)
        others = [self._turn(place // count)[place % count] for place in range(begin, end)]
        sides = [self._listed[index] for index in self._batches.indices(step)], others
        # Spread evenly, so that every part of a batch has its share of both.
        placed = [((i + 0.5) / len(side), row) for side in sides for i, row in enumerate(side)]
        return [row for _, row in sorted(placed, key=lambda pair: pair[0])]

    def _turn(self, turn: int) -> list[int]:
        if turn not in self._turns:
            generator = self._generator(f"order of random rows, turn {turn}")
            order = torch.randperm(len(self._others), generator=generator).tolist()
            self._turns[turn] = [self._others[place] for place in order]
        return self._turns[turn]


def steps_an_epoch(rows: int, batch_size: int, chunk_size: int | None) -> int:
    """Batches that a pass over all forget rows takes; none has rows of two chunks."""
    return sum(-(-len(chunk) // batch_size) for chunk in chunks_of(rows, chunk_size))


def chunks_of(rows: int, chunk_size: int | None) -> list[range]:
    """The rows in file order, so many a chunk; the last may have fewer."""
    size = chunk_size or rows
    return [range(start, min(start + size, rows)) for start in range(0, rows, size)]


class ChunkedBatches(StepBatches):
    """Chunk after chunk, each with all passes of a round before the next one begins.

    A function of the seed and the step alone. A run of less than an epoch sees the first chunks only.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        pad_id: int,
        generator: Callable[[int], torch.Generator],
        sampling: Sampling,
        steps: int,
        *,
        by_length: bool = True,
    ) -> None:
        """`steps` of the whole run: what is left of whole epochs begins with the first chunk again."""
        super().__init__(examples, pad_id)
        self._batch_size, self._generator, self._by_length = batch_size, generator, by_length
        self._chunks = chunks_of(len(examples), sampling.chunk_size)
        epochs = max(1, steps // steps_an_epoch(len(examples), batch_size, sampling.chunk_size))
        cuts = [epochs * done // sampling.rounds for done in range(sampling.rounds + 1)]
        self._visits = [
            (epoch, chunk)
            for begin, end in pairwise(cuts)
            for chunk in range(len(self._chunks))
            for epoch in range(begin, end)
        ]
        self._ends = list(
            accumulate(-(-len(self._chunks[chunk]) // batch_size) for _, chunk in self._visits)
        )
        self._epochs = epochs
        self._visit: tuple[int, int] | None = None
        self._order: list[list[int]] = []

    def indices(self, step: int) -> list[int]:
        """Positions of the rows of a step, counted from 1."""
        again, place = divmod(step - 1, self._ends[-1])
        visit = bisect_right(self._ends, place)
        epoch, chunk = self._visits[visit]
        epoch += again * self._epochs
        if self._visit != (epoch, chunk):
            self._order = self._order_of(epoch, chunk)
            self._visit = epoch, chunk
        return self._order[place - (self._ends[visit - 1] if visit else 0)]

    def _order_of(self, epoch: int, chunk: int) -> list[list[int]]:
        generator = self._generator(epoch)
        for rows in self._chunks[: chunk + 1]:  # one generator draws for all chunks of an epoch
            lengths = [len(self._examples[row]) for row in rows]
            order = epoch_order(lengths, self._batch_size, generator, by_length=self._by_length)
        return [[rows[index] for index in batch] for batch in order]


def step_batches(
    forget: Sequence[Example],
    retain: Sequence[Example],
    batch_size: int,
    pad_id: int,
    generator: Callable[[str], torch.Generator],
    sampling: Sampling,
    steps: int,
    *,
    by_length: bool = True,
) -> tuple[StepBatches, StepBatches | None]:
    """What every step of a run takes of both sides; `generator` gives that of a purpose.

    `by_length` puts rows of similar length together.
    """

    def order(epoch: int) -> torch.Generator:
        return generator(f"forget order of epoch {epoch}")

    forgotten: StepBatches = (
        EpochBatches(forget, batch_size, pad_id, order, by_length=by_length)
        if sampling.chunk_size is None
        else ChunkedBatches(forget, batch_size, pad_id, order, sampling, steps, by_length=by_length)
    )
    if not retain:
        return forgotten, None
    rows = batch_size * sampling.retain_ratio
    beside = round(rows * sampling.written_ratio) if sampling.written_ratio else None
    return forgotten, BesideRandom(retain, rows, pad_id, generator, by_length=by_length, beside=beside)
