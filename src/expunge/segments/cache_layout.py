"""Which rows' hidden states are kept on disk, where they are in the files, and how much that takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from expunge.data.tokenization import Example

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Slot:
    """Where a row's states are in the files, in tokens."""

    start: int
    length: int

    @property
    def span(self) -> tuple[int, int]:
        """As StateFile.read takes it."""
        return self.start, self.length


@dataclass(frozen=True)
class CacheLayout:
    """Which rows are kept, and how much that takes."""

    slots: Mapping[Ids, Slot]
    """Rows whose states are kept, by token ids; equal rows share a slot."""
    trained: int
    """Tokens of rows that are trained on; their slots come first, with a target each."""
    tokens: int
    missing: int
    """Rows that did not fit under the limit; their states are computed each time."""
    width: int
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size on disk: states below the segment, targets, and a norm each."""
        return (self.tokens + self.trained) * self.width * self.dtype.itemsize + 4 * self.trained


def lay_out(
    trained: Iterable[Example],
    measured: Iterable[Example],
    width: int,
    dtype: torch.dtype,
    limit: float | None,
) -> CacheLayout:
    """Gives every row a slot until `limit` bytes are used; None is no limit."""
    slots: dict[Ids, Slot] = {}
    missing: set[Ids] = set()
    tokens = trained_tokens = 0
    for kind, examples in (("trained", trained), ("measured", measured)):
        for example in examples:
            ids = example.input_ids
            if ids in slots or ids in missing:
                continue
            more = len(ids) if kind == "trained" else 0
            sized = CacheLayout(
                slots, trained_tokens + more, tokens + len(ids), len(missing), width, dtype
            )
            if limit is not None and sized.bytes > limit:
                missing.add(ids)
                continue
            slots[ids] = Slot(tokens, len(ids))
            tokens, trained_tokens = sized.tokens, sized.trained
    return CacheLayout(slots, trained_tokens, tokens, len(missing), width, dtype)
