"""Keys and values of rows that decode together: aligned at their last token, with room to grow.

transformers' own cache copies itself for every new token. Here a token is written in place, rows that
have ended leave, and rows that have just been read join.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

Past = list[tuple[torch.Tensor, torch.Tensor]]
"""By layer the keys and values of one row, each (heads, tokens, width)."""
ROOM = 64
"""Tokens that can be written before the cache is laid out anew."""


class _RoomyLayer(DynamicLayer):
    """A layer's keys and values, (rows, heads, tokens, width), as the filled part of larger tensors."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, filled: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self._all = (keys, values)
        self._show(filled)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        for whole, new in zip(self._all, (key_states, value_states), strict=True):
            whole[:, :, start:end] = new
        self._show(end)
        return self.keys, self.values

    def _show(self, filled: int) -> None:
        self.keys, self.values = (whole[:, :, :filled] for whole in self._all)


def empty_cache() -> Cache:
    """One that keeps every token, in layers with a sliding window too: their masks know the window.

    A cache that drops what left the window could not be cut back to the end of a draft.
    """
    return DynamicCache()


def past_of(cache: Cache, row: int, tokens: int) -> Past:
    """A copy of the first `tokens` of one row, so that the batch it came from can be freed."""
    return [
        (layer.keys[row, :, :tokens].clone(), layer.values[row, :, :tokens].clone())
        for layer in cache.layers
    ]


def shared_cache(past: Past, rows: int) -> Cache:
    """The same past for each of `rows` rows, not copied until the first update."""
    cache = DynamicCache()
    for index, (keys, values) in enumerate(past):
        cache.update(keys.expand(rows, *keys.shape), values.expand(rows, *values.shape), index)
    return cache


def joined(
    cache: Cache | None, kept: Sequence[int], lengths: Sequence[int], added: Sequence[Past]
) -> Cache:
    """The rows `kept` of `cache`, whose last `lengths` tokens count, followed by those of `added`.

    Every row ends at the cache's last token; what is left of a shorter row is to be masked.
    """
    longest = max([*lengths, *(past[0][0].shape[1] for past in added)])
    layers = []
    for index in range(len(cache.layers) if cache is not None else len(added[0])):
        old_keys = old_values = None
        if cache is not None and kept:
            old_keys, old_values = cache.layers[index].keys, cache.layers[index].values
        width = max(lengths, default=0)
        keys = _laid_out(old_keys, kept, width, longest, [past[index][0] for past in added])
        values = _laid_out(old_values, kept, width, longest, [past[index][1] for past in added])
        layers.append(_RoomyLayer(keys, values, longest))
    return Cache(layers=layers)


def _laid_out(
    old: torch.Tensor | None,
    kept: Sequence[int],
    width: int,
    longest: int,
    added: Sequence[torch.Tensor],
) -> torch.Tensor:
    """The last `width` tokens of the rows `kept` of `old`, and `added`, each (heads, tokens, width)."""
    like = old[0] if old is not None else added[0]
    new = like.new_empty(len(kept) + len(added), like.shape[0], longest + ROOM, like.shape[-1])
    # A masked entry has no weight, but it must be finite.
    new[: len(kept), :, : longest - width] = 0
    if old is not None:
        rows = torch.tensor(kept, device=old.device)
        new[: len(kept), :, longest - width : longest] = old[:, :, -width:].index_select(0, rows)
    for row, past in enumerate(added, len(kept)):
        new[row, :, : longest - past.shape[1]] = 0
        new[row, :, longest - past.shape[1] : longest] = past
    return new
