"""A forward pass: logits only where tokens count, activations kept or recomputed.

The unembedding is the widest product of a small model, and its output the widest tensor of any.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from expunge.models.decoder import DecoderLayout, forward_hook, states_of, with_states
from expunge.models.kernels import products_again

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
_PROBE = (2, 6)


def logits_at(model: PreTrainedModel, where: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """Runs `model` on `inputs` and gives its logits at the places marked in `where`.

    where (rows, tokens), boolean -> (marked, vocabulary), in reading order. The LM head is given the
    hidden states of these places alone, as one row; what a family does to logits after its head
    (scaling, soft caps) is done to them too. A model that names no head, or gives it something else,
    unembeds every token. Raises ValueError where its logits are not its head's output.
    """
    return _logits_at(model, where, inputs)[0]


def _logits_at(
    model: PreTrainedModel, where: torch.Tensor, inputs: Mapping[str, Any]
) -> tuple[torch.Tensor, bool]:
    """The same, and whether the head ran at these places alone."""
    head = model.get_output_embeddings()
    marked: int | None = None

    def choose(_head: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        nonlocal marked
        hidden, *others = arguments
        if hidden.shape[:2] != where.shape:
            return None
        # (rows, tokens, width) -> (1, marked, width): what follows the head works token by token.
        chosen = hidden[where.to(hidden.device)][None]
        marked = chosen.shape[1]
        return (chosen, *others)

    handle = head.register_forward_pre_hook(choose) if isinstance(head, nn.Module) else None
    try:
        logits: torch.Tensor = model(**inputs).logits
    finally:
        if handle is not None:
            handle.remove()
    if marked is None:
        return logits[where.to(logits.device)], False
    if logits.shape[:-1] != (1, marked):
        raise ValueError("the model's logits are not its head's output")
    return logits[0], True


def all_logits(
    model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> torch.Tensor:
    """Next-token logits everywhere: (rows, tokens, vocabulary)."""
    return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


@torch.no_grad()
def head_takes_places(model: PreTrainedModel) -> bool:
    """Whether the head can run at chosen places alone and give what the model itself gives.

    Tried on a few tokens with padding.
    """
    ids = _probe_ids(model)
    real = torch.ones_like(ids)
    real[1, -2:] = 0
    where = real.bool()
    where[0, 2] = False
    expected = all_logits(model, ids, real)[where].float()
    inputs = {"input_ids": ids, "attention_mask": real, "use_cache": False}
    try:
        found, alone = _logits_at(model, where, inputs)
    except (ValueError, RuntimeError):
        return False
    tolerance = _ROUNDING.get(model.dtype, 3e-2) * float(expected.abs().max())
    return alone and torch.allclose(found.float(), expected, rtol=0, atol=tolerance)


@torch.no_grad()
def lens_in_one_pass(model: PreTrainedModel, layout: DecoderLayout) -> bool:
    """Whether the logit lens can run beside the model in one pass (`lens_added`).

    Tried on a few tokens: a family that gives the last layer's output the shape of the input cannot.
    """
    ids = _probe_ids(model)
    where = torch.ones_like(ids).bool()
    inputs = {"input_ids": ids, "attention_mask": where.long(), "use_cache": False}
    plain = logits_at(model, where, **inputs).float()
    try:
        with lens_added(model, layout, 0):
            both = logits_at(model, torch.cat([where, where]), **inputs).float()
    except (ValueError, RuntimeError, IndexError):
        return False
    tolerance = _ROUNDING.get(model.dtype, 3e-2) * float(plain.abs().max())
    return len(both) == 2 * len(plain) and torch.allclose(
        both[: len(plain)], plain, rtol=0, atol=tolerance
    )


def _probe_ids(model: PreTrainedModel) -> torch.Tensor:
    """A few tokens, (rows, tokens), to try on a model what not every family can."""
    rows, tokens = _PROBE
    ids = torch.arange(rows * tokens, device=model.device).view(rows, tokens)
    return ids % model.config.get_text_config().vocab_size


@contextmanager
def lens_added(model: nn.Module, layout: DecoderLayout, layer: int) -> Iterator[None]:
    """Forward passes in the body unembed the states after `layer` as well, in the same call.

    These follow the rows that the last layer gives, as rows of their own: (rows, ...) -> (2 rows, ...).
    The final norm and the head are the model's (the logit lens), and gradients reach both.
    """
    inner: list[torch.Tensor] = []

    def caught(_module: nn.Module, _inputs: object, output: Any) -> None:
        inner[:] = [states_of(output)]

    def added(_module: nn.Module, _inputs: object, output: Any) -> Any:
        return with_states(output, torch.cat([states_of(output), inner.pop()]))

    last = layout.layer(model, layout.count - 1)
    with forward_hook(layout.layer(model, layer), caught), forward_hook(last, added):
        yield


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
            vars(layer)["forward"] = partial(
                checkpoint, layer.forward, use_reentrant=False, context_fn=products_again
            )
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                vars(layer).pop("forward", None)
            else:
                vars(layer)["forward"] = forward
