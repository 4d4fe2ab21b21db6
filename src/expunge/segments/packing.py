"""Rows of different lengths side by side in one sequence, without padding.

Linear maps and norms do not mind where a row ends; attention does. It is replaced, through the
interface that transformers has for that, by one that keeps every row to itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_NAME = "expunge_packed"
_lengths: ContextVar[tuple[int, ...]] = ContextVar("lengths")


class NotASegment(Exception):
    """Why layers of a model cannot be run on their own."""


def positions_of(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """Positions of packed rows, each counted from 0: (tokens,)."""
    return torch.cat([torch.arange(length) for length in lengths]).to(device)


@contextmanager
def packed(config: PretrainedConfig, lengths: Sequence[int]) -> Iterator[None]:
    """Forward passes in the body take one sequence that holds rows of these lengths.

    Only for models whose attention goes through transformers' interface; others do not notice and
    mix the rows, which the check of a segment finds.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, _packed_attention)
    own = config._attn_implementation
    token = _lengths.set(tuple(lengths))
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = own
        _lengths.reset(token)


def _packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each row; query, key and value are (1, heads, tokens, width)."""
    if dropout or any(kwargs.get(extra) is not None for extra in ("softcap", "position_bias")):
        raise NotASegment("its attention has dropout, soft capping or a position bias")
    lengths = _lengths.get()
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    window = sliding_window or max(lengths)
    rows = _row_by_row if query.device.type == "cpu" else _padded
    return rows(query, key, value, lengths, scaling, window).transpose(1, 2), None


def _row_by_row(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: tuple[int, ...],
    scaling: float | None,
    window: int,
) -> torch.Tensor:
    """One call a row: nothing is computed twice, and a processor does not mind many calls.

    Gradients are computed in float32: in bfloat16 oneDNN compiles products for every length of row,
    which cost more than what they compute (docs/decisions.md).
    """

    def each(*states: torch.Tensor) -> torch.Tensor:
        parts = zip(*(x.split(lengths, dim=2) for x in states), strict=True)
        return torch.cat([_causal(q, k, v, scaling, window) for q, k, v in parts], dim=2)

    if not query.requires_grad:
        return each(query, key, value)
    with torch.autocast(query.device.type, enabled=False):
        return each(query.float(), key.float(), value.float()).to(query.dtype)


def _padded(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: tuple[int, ...],
    scaling: float | None,
    window: int,
) -> torch.Tensor:
    """One call for all rows, padded on the right, where no causal query looks."""
    width = max(lengths)
    device = query.device
    sizes = torch.tensor(lengths, device=device)
    starts = sizes.cumsum(0) - sizes
    inside = torch.arange(width, device=device)[None, :] < sizes[:, None]
    source = (starts[:, None] + torch.arange(width, device=device)[None, :]).clamp(
        max=query.shape[2] - 1
    )
    q, k, v = (x[0].transpose(0, 1)[source].transpose(1, 2) for x in (query, key, value))
    result = _causal(q, k, v, scaling, window)
    return result.transpose(1, 2)[inside].transpose(0, 1)[None]


def _causal(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    window: int,
) -> torch.Tensor:
    length = query.shape[2]
    if window >= length:
        return functional.scaled_dot_product_attention(query, key, value, scale=scaling, is_causal=True)
    distance = torch.arange(length, device=query.device)
    behind = distance[:, None] - distance[None, :]
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=(behind >= 0) & (behind < window), scale=scaling
    )
