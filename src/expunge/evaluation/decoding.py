"""Decoding of many rows at once, each as if it were alone; greedy, or by any other choice of tokens.

A row may bring a draft: tokens that it probably gets. One pass over prompt and draft tells how many of
them decoding would have chosen; those are kept, the first other choice replaces the rest, and the row
goes on token by token, among others that are not done. A draft changes the speed only.
"""

from __future__ import annotations

import inspect
import itertools
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import Cache

from expunge.errors import InputError
from expunge.evaluation.batches import on_first_side, padded, rows_within
from expunge.evaluation.cache import ROOM, Past, empty_cache, joined, past_of
from expunge.evaluation.choices import Choice, Greedy, Place, logits_after, logits_alone
from expunge.methods.forward import logits_at
from expunge.models.rope import switch_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TRIED = {torch.float32: 1e-3}
_FIRST_LOOK = 4
"""New tokens after which a row is first asked whether it is lost."""


@dataclass(repr=False)
class Request:
    """One row: what to continue, what to try first, and how many tokens it may get."""

    prompt: Sequence[int]
    draft: Sequence[int]
    room: int
    right: list[bool] | None = None
    """If a list, it is filled: whether each token of the draft is the choice after those before it."""
    lost: Callable[[Sequence[int]], bool] | None = None
    """Whether nothing that can follow these new tokens matters; the row ends there. It is asked at 4, 8,
    16 and so on: to read a text after every token would cost more of a small model's step."""


@dataclass(repr=False)
class _Row:
    """A row on its way; all tokens but the last are in the cache."""

    index: int
    request: Request
    new: list[int] = field(default_factory=list)

    @property
    def cached(self) -> int:
        return len(self.request.prompt) + len(self.new) - 1

    def place(self, ahead: int = 0) -> Place:
        """That of the next token, or of one further on."""
        return self.index, len(self.new) + ahead

    def over(self, ends: Collection[int]) -> bool:
        count, lost = len(self.new), self.request.lost
        if count >= self.request.room or self.new[-1] in ends:
            return True
        return lost is not None and count >= _FIRST_LOOK and count & (count - 1) == 0 and lost(self.new)


def greedy(
    model: PreTrainedModel, requests: Sequence[Request], ends: Collection[int], batch_size: int
) -> Iterator[tuple[int, list[int]]]:
    """Each row's likeliest tokens, as `decode` gives them."""
    return decode(model, requests, ends, batch_size, Greedy())


def decode(
    model: PreTrainedModel,
    requests: Sequence[Request],
    ends: Collection[int],
    batch_size: int,
    choose: Choice,
) -> Iterator[tuple[int, list[int]]]:
    """(index of the request, its new tokens with the end that stopped it), as rows are done.

    At most `batch_size` rows are in a batch, those of similar length together.
    """
    switch = switch_of(model.config)
    requests = [_drafted(request, switch) for request in requests]
    order = sorted(range(len(requests)), key=lambda i: -_length(requests[i]))
    waiting = deque(order)
    pool = _Pool(model, ends, choose, cached=cache_serves(model))
    while waiting or pool.rows:
        read: list[tuple[_Row, Past]] = []
        while waiting and _admits(pool, _length(requests[waiting[0]]), len(read), batch_size):
            most = batch_size - len(pool.rows) - len(read)
            count = rows_within(_length(requests[waiting[0]]), most, model.device)
            ahead = [_length(requests[i]) for i in itertools.islice(waiting, count)]
            chosen = [waiting.popleft() for _ in range(on_first_side(ahead, switch))]
            for row, past in pool.read([_Row(i, requests[i]) for i in chosen]):
                if past is None:
                    yield row.index, row.new
                else:
                    read.append((row, past))
        if read:
            pool.join(read)
        if pool.rows:
            for row in pool.step():
                yield row.index, row.new


def stream(
    model: PreTrainedModel, request: Request, ends: Collection[int], choose: Choice
) -> Iterator[int]:
    """One row's new tokens as they are decided, with the end that stops it: those of `decode`."""
    row = _Row(0, _drafted(request, switch_of(model.config)))
    pool = _Pool(model, ends, choose, cached=cache_serves(model))
    ((_, past),) = pool.read([row])
    yield from row.new
    if past is None:
        return
    pool.join([(row, past)])
    while pool.rows:
        pool.step()
        yield row.new[-1]


def _length(request: Request) -> int:
    return len(request.prompt) + len(request.draft)


def _drafted(request: Request, switch: int) -> Request:
    """The request with no more of its draft than is decided before the model switches (LongRoPE)."""
    left = switch - len(request.prompt)
    return request if left < 0 else replace(request, draft=request.draft[:left])


def _admits(pool: _Pool, length: int, read: int, batch_size: int) -> bool:
    """Rows join a pool that is half empty; one of long rows would pad short ones, so they wait."""
    if read or not pool.rows:
        return len(pool.rows) + read < batch_size
    return len(pool.rows) <= batch_size // 2 and 2 * length >= pool.width


def _accept(
    model: PreTrainedModel,
    row: _Row,
    draft: Sequence[int],
    tokens: Sequence[int],
    near: Sequence[bool],
    ends: Collection[int],
    choose: Choice,
) -> None:
    """Adds choices to a row for as long as its draft foresaw them, and the first that it did not."""
    for position, (token, unsure) in enumerate(zip(tokens, near, strict=True)):
        row.new.append(_alone(model, row, choose) if unsure else token)
        drafted = draft[position : position + 1]
        if row.over(ends) or list(drafted) != row.new[-1:]:
            return


def _foreseen(
    model: PreTrainedModel,
    row: _Row,
    tokens: Sequence[int],
    near: Sequence[bool],
    choose: Choice,
) -> list[bool]:
    """Of each token of the draft whether it is the choice after those of the draft before it."""
    draft = row.request.draft
    return [
        (_alone(model, replace(row, new=[*draft[:place]]), choose) if near[place] else tokens[place])
        == wanted
        for place, wanted in enumerate(draft)
    ]


def _alone(model: PreTrainedModel, row: _Row, choose: Choice) -> int:
    """The next token of a row by a pass of this row only."""
    logits = logits_alone(model, [*row.request.prompt, *row.new])
    return choose.alone(logits[0], row.place())


_SERVES: weakref.WeakKeyDictionary[PreTrainedModel, bool] = weakref.WeakKeyDictionary()


def cache_serves(model: PreTrainedModel) -> bool:
    """Whether a row goes on from its keys and values as it would from its tokens.

    Tried once a model, on two rows of unlike length, the longer one's past cut back. It is not so of a
    recurrence, whose state is of all that was read. Raises InputError where a token's logits depend on
    what follows it: nothing here holds for such a model.
    """
    if model not in _SERVES:
        _SERVES[model] = _cache_serves(model)
    return _SERVES[model]


@torch.no_grad()
def _cache_serves(model: PreTrainedModel) -> bool:
    vocabulary = model.config.get_text_config().vocab_size
    long, short = ([token % vocabulary for token in row] for row in (range(2, 10), range(11, 14)))
    expected = torch.cat([logits_alone(model, row) for row in (long[:6], short)])
    if not torch.isfinite(expected).all():  # whatever is done with it, it answers no numbers
        return True
    near = _TRIED.get(model.dtype, 5e-2) * float(expected.abs().max())
    padded_ids = padded([long, short]).to(model.device)
    where = torch.zeros(padded_ids.shape, dtype=torch.bool)
    where[0, 5] = where[1, 2] = True
    # Of one shape, so that a model whose weights an attack ruined rounds both alike.
    behind = where.cumsum(1).bool() & ~where
    others = torch.where(behind.to(model.device), (padded_ids + 1) % vocabulary, padded_ids)
    seen, changed = (
        logits_at(model, where, input_ids=ids, use_cache=False) for ids in (padded_ids, others)
    )
    if not torch.allclose(seen, changed, rtol=0, atol=near, equal_nan=True):
        raise InputError(
            f"{model.config.model_type}: a token's logits depend on the tokens behind it; give a causal"
            " language model"
        )
    rows = [
        _Row(0, Request(long[:4], long[4:], 9), new=long[4:6]),
        _Row(1, Request(short[:1], short[1:], 9), new=short[1:]),
    ]
    pool, cache = _Pool(model, (), Greedy()), empty_cache()
    try:
        model(input_ids=padded_ids, past_key_values=cache, use_cache=True)
        pool.join([(row, past_of(cache, row.index, row.cached)) for row in rows])
        return torch.allclose(pool.logits(), expected, rtol=0, atol=near)
    except Exception:  # families fail in many ways on a cache that is not theirs
        return False


class _Pool:
    """Rows that get one token each a step."""

    def __init__(
        self,
        model: PreTrainedModel,
        ends: Collection[int],
        choose: Choice,
        *,
        cached: bool = True,
    ) -> None:
        """Without a cache every step reads rows from their beginning."""
        self._model = model
        self._ends = ends
        self._choose = choose
        self._cached = cached
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self._batch: list[_Row | None] = []
        """The cache's rows in order; None where one has ended and not yet left."""
        self._cache: Cache | None = None
        self._filled = 0
        self._end = 0

    @property
    def rows(self) -> list[_Row]:
        return [row for row in self._batch if row is not None]

    @property
    def width(self) -> int:
        return max(row.cached for row in self.rows)

    @torch.no_grad()
    def read(self, rows: Sequence[_Row]) -> list[tuple[_Row, Past | None]]:
        """Reads rows: each with its next new tokens, and its past unless it is over.

        A row without new tokens is read with its draft.
        """
        drafts = [() if row.new else row.request.draft for row in rows]
        texts = [
            [*row.request.prompt, *row.new, *draft] for row, draft in zip(rows, drafts, strict=True)
        ]
        ids = padded(texts)
        where = torch.zeros(ids.shape, dtype=torch.bool)
        for number, row in enumerate(rows):
            where[number, row.cached : len(texts[number])] = True
        cache = empty_cache() if self._cached else None
        kept = {} if cache is None else {"past_key_values": cache}
        inputs = {"input_ids": ids.to(self._model.device), "use_cache": self._cached, **kept}
        logits = logits_at(self._model, where, **inputs)
        places = [
            row.place(ahead)
            for row, draft in zip(rows, drafts, strict=True)
            for ahead in range(len(draft) + 1)
        ]
        tokens, near = self._choose(logits, places)
        start = 0
        done: list[tuple[_Row, Past | None]] = []
        for number, row in enumerate(rows):
            count = len(drafts[number]) + 1
            span = slice(start, start + count)
            chosen = (tokens[span], near[span])
            _accept(self._model, row, drafts[number], *chosen, self._ends, self._choose)
            if row.request.right is not None and drafts[number]:
                row.request.right[:] = _foreseen(self._model, row, *chosen, self._choose)
            start += count
            past: Past | None = None if row.over(self._ends) else []
            if cache is not None and past is not None:
                past = past_of(cache, number, row.cached)
            done.append((row, past))
        return done

    def join(self, added: Sequence[tuple[_Row, Past]] = ()) -> None:
        """Lays the cache out anew: rows that have ended leave, `added` ones join."""
        if not self._cached:
            self._batch = [*self.rows, *(row for row, _ in added)]
            return
        kept = [place for place, row in enumerate(self._batch) if row is not None]
        lengths = [row.cached for row in self.rows]
        self._cache = joined(self._cache, kept, lengths, [past for _, past in added])
        self._batch = [*self.rows, *(row for row, _ in added)]
        self._filled = self.width
        self._end = self._filled + ROOM

    def step(self) -> list[_Row]:
        """One more token for each row; those that are over with it leave and are returned.

        Rows that have come to a switch by length get theirs first, alone, for what is in the cache is
        of the side before.
        """
        switch = switch_of(self._model.config)
        crossed = [row for row in self.rows if row.cached == switch]
        if crossed:
            return self._read_anew(crossed)
        with torch.no_grad():
            logits = self.logits()
        over = []
        live = [(place, row) for place, row in enumerate(self._batch) if row is not None]
        chosen = self._choose(logits, [row.place() for _, row in live])
        for (place, row), token, unsure in zip(live, *chosen, strict=True):
            row.new.append(_alone(self._model, row, self._choose) if unsure else token)
            if row.over(self._ends):
                self._batch[place] = None
                over.append(row)
        return over

    def logits(self) -> torch.Tensor:
        """The logits after each row, (rows, vocabulary)."""
        if not self._cached:
            return logits_after(self._model, [[*row.request.prompt, *row.new] for row in self.rows])
        if self._filled == self._end or 4 * len(self.rows) <= 3 * len(self._batch):
            self.join()
        device = self._model.device
        # One that has ended begins anew: its own positions could run out of the context.
        lengths = torch.tensor([0 if row is None else row.cached for row in self._batch])
        mask = torch.arange(self._filled + 1)[None, :] >= self._filled - lengths[:, None]
        positions = {"position_ids": lengths[:, None].to(device)} if self._takes_positions else {}
        last = [[0 if row is None else row.new[-1]] for row in self._batch]
        logits: torch.Tensor = self._model(
            input_ids=torch.tensor(last, device=device),
            attention_mask=mask.long().to(device),
            past_key_values=self._cache,
            use_cache=True,
            **positions,
        ).logits[:, -1]
        self._filled += 1
        live = [place for place, row in enumerate(self._batch) if row is not None]
        return logits if len(live) == len(self._batch) else logits[live]

    def _read_anew(self, rows: Sequence[_Row]) -> list[_Row]:
        indices = {row.index for row in rows}
        self._batch = [None if row and row.index in indices else row for row in self._batch]
        # One at a time: they are as long as a budget of tokens, or longer.
        read = [self.read([row])[0] for row in rows]
        if going_on := [(row, past) for row, past in read if past is not None]:
            self.join(going_on)
        return [row for row, past in read if past is None]
