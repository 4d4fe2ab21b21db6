"""A forward pass for a loss: logits only where tokens count, activations kept or recomputed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
_PROBE = (2, 6)


def logits_at(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    where: torch.Tensor,
) -> torch.Tensor:
    """Next-token logits at the places marked in `where`, in reading order: (marked, vocabulary).

    All arguments are (rows, tokens). The LM head is given the hidden states of these places alone,
    as one row; what a family does to logits after its head (scaling, soft caps) is done to them too.
    Raises ValueError where the model does not treat its head as this needs: see `head_takes_places`.
    """

    def gather(_head: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        (hidden,) = arguments
        if hidden.shape[:2] != where.shape:
            raise ValueError("the head is not given one hidden state a token")
        return (hidden[where][None],)

    head = model.get_output_embeddings()
    if head is None:
        raise ValueError("the model names no head")
    handle = head.register_forward_pre_hook(gather)
    try:
        logits = all_logits(model, input_ids, attention_mask)
    finally:
        handle.remove()
    if logits.shape[:-1] != (1, int(where.sum())):
        raise ValueError("the model's logits are not its head's output")
    return logits[0]


def all_logits(
    model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> torch.Tensor:
    """Next-token logits everywhere: (rows, tokens, vocabulary)."""
    return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


@torch.no_grad()
def head_takes_places(model: PreTrainedModel) -> bool:
    """Whether `logits_at` gives what the model itself gives, tried on a few tokens with padding."""
    rows, tokens = _PROBE
    ids = torch.arange(rows * tokens, device=model.device).view(rows, tokens)
    ids %= model.config.get_text_config().vocab_size
    real = torch.ones_like(ids)
    real[1, -2:] = 0
    where = real.bool()
    where[0, 2] = False
    expected = all_logits(model, ids, real)[where].float()
    try:
        found = logits_at(model, ids, real, where).float()
    except (ValueError, RuntimeError):
        return False
    tolerance = _ROUNDING.get(model.dtype, 3e-2) * float(expected.abs().max())
    return torch.allclose(found, expected, rtol=0, atol=tolerance)


@contextmanager
def recomputed(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Forward passes in the body keep each layer's input only; backward runs the layer once more.

    transformers' own switch works in training mode alone. That would turn on the dropout of families
    that have it in their layers, and turn off the cache of generation.
    """
    layers = list(layers)
    before = [vars(layer).get("forward") for layer in layers]
    try:
        for layer in layers:
            vars(layer)["forward"] = partial(checkpoint, layer.forward, use_reentrant=False)
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                vars(layer).pop("forward", None)
            else:
                vars(layer)["forward"] = forward
