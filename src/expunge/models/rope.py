"""LongRoPE: a text beyond the pretraining length turns by other frequencies, all of its tokens alike.

transformers asks how long the longest row of a batch is, so a row's neighbours would change what a
model says of it. Here each row turns as it would alone. arXiv 2402.13753.
"""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def switch_of(config: PretrainedConfig) -> int:
    """The most tokens of a text that turns by the short factors; beyond any text where all are alike."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return sys.maxsize
    return int(rope["original_max_position_embeddings"])


def keep_rows_apart(model: PreTrainedModel) -> None:
    """Lets each row of a batch turn by its own length, where a mask or positions tell the lengths.

    Nothing changes for models without LongRoPE. Right-padded rows without either must be on one side.
    """
    if switch_of(model.config) == sys.maxsize:
        return
    for module in model.modules():
        if hasattr(module, "inv_freq") and _apart not in module._forward_hooks.values():
            module.register_forward_hook(_apart, with_kwargs=True)
    if _positions not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_positions, with_kwargs=True)


def _positions(
    _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Right padding takes the position of its row's last token, so that positions tell lengths."""
    mask, given = kwargs.get("attention_mask"), ("position_ids", "past_key_values")
    if mask is None or mask.ndim != 2 or any(kwargs.get(name) is not None for name in given):
        return None
    return args, {**kwargs, "position_ids": (mask.long().cumsum(1) - 1).clamp(min=0)}


def _apart(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> tuple[torch.Tensor, ...] | None:
    """Cosines and sines, (rows, tokens, width), of rows on both sides; None where all are on one."""
    called = inspect.signature(module.forward).bind(*args, **kwargs)
    positions = called.arguments["position_ids"]
    # A row, or one of several packed into one sequence, begins at position 0.
    row = (positions == 0).long().cumsum(1)
    last = positions.new_zeros(len(row), int(row.max()) + 1)
    last = last.scatter_reduce(1, row, positions, "amax")
    long = last.gather(1, row) >= switch_of(module.config)
    if long.all() or not long.any():
        return None
    called.arguments["position_ids"] = positions.masked_fill(long, 0)
    short = module.forward(*called.args, **called.kwargs)
    return tuple(torch.where(long[..., None], *pair) for pair in zip(output, short, strict=True))
