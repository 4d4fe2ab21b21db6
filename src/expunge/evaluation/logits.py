"""Logits at chosen positions only: the unembedding is the widest product of a small model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def logits_at(model: PreTrainedModel, where: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """Runs `model` on `inputs` and unembeds the positions of `where` alone.

    where (rows, tokens), boolean -> (true entries, vocabulary), row by row, in the model's dtype.
    """
    where = where.to(model.device)
    head = model.get_output_embeddings()
    chosen = False

    def choose(_module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal chosen
        chosen = True
        # (rows, tokens, width) -> (1, entries, width): what follows the head works token by token.
        return (arguments[0][where][None], *arguments[1:])

    handle = head.register_forward_pre_hook(choose) if isinstance(head, nn.Module) else None
    try:
        with torch.no_grad():
            logits: torch.Tensor = model(**inputs).logits
    finally:
        if handle is not None:
            handle.remove()
    return logits[0] if chosen else logits[where]
