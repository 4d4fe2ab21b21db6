"""Membership inference by the loss of whole documents."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch

from expunge.data.batches import Batch, collate
from expunge.data.tokenization import Example
from expunge.evaluation.batches import token_batches
from expunge.maths.membership import RowLosses
from expunge.maths.numerics import target_log_probs
from expunge.methods.forward import logits_at
from expunge.models.kernels import fast_products
from expunge.processes import OneProcess, Processes, gathered

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Found = TypeVar("Found")


def document_losses(
    model: PreTrainedModel,
    examples: Sequence[Example],
    pad_id: int,
    batch_size: int,
    advance: Callable[[int], None] = lambda _: None,
    processes: Processes | None = None,
) -> dict[str, float]:
    """Mean loss of each row's tokens in nats, by row id; a windowed row counts as one document.

    Several processes share the batches and each gets all losses.
    """

    def losses(batch: Batch, log_probs: torch.Tensor) -> RowLosses:
        found = RowLosses()
        found.add(batch, log_probs)
        return found

    return RowLosses.of_all(
        _of_batches(losses, model, examples, pad_id, batch_size, advance, processes)
    ).means()


def document_log_probs(
    model: PreTrainedModel,
    examples: Sequence[Example],
    pad_id: int,
    batch_size: int,
    advance: Callable[[int], None] = lambda _: None,
    processes: Processes | None = None,
) -> dict[str, torch.Tensor]:
    """Log-probabilities of each row's counted tokens in nats, (tokens,), by row id, in no order.

    A windowed row counts as one document. Several processes share the batches and each gets all.
    """

    def rows(batch: Batch, log_probs: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        counted = batch.token_mask[:, 1:]
        return [(row, log_probs[line][counted[line]].cpu()) for line, row in enumerate(batch.row_ids)]

    found = _of_batches(rows, model, examples, pad_id, batch_size, advance, processes)
    parts: dict[str, list[torch.Tensor]] = {}
    for row, values in itertools.chain.from_iterable(found):
        parts.setdefault(row, []).append(values)
    return {row: torch.cat(values) for row, values in parts.items()}


def _of_batches(
    read: Callable[[Batch, torch.Tensor], Found],
    model: PreTrainedModel,
    examples: Sequence[Example],
    pad_id: int,
    batch_size: int,
    advance: Callable[[int], None],
    processes: Processes | None,
) -> list[Found]:
    """What is read of every batch and its `counted_log_probs`, whichever process has it.

    In the order of the batches, for the windows of a row may lie in several.
    """
    processes = processes or OneProcess()
    batches = token_batches([len(e) for e in examples], batch_size, model)
    found: dict[int, Found] = {}
    with torch.no_grad(), fast_products(model.dtype, model.device):
        for number in range(processes.rank, len(batches), processes.count):
            batch = collate(examples, batches[number], pad_id).to(model.device)
            found[number] = read(batch, counted_log_probs(model, batch))
            advance(len(batches[number]))
    return gathered(processes, found)


def counted_log_probs(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Log-probability of each counted token in nats, (rows, tokens - 1); 0 where none is counted."""
    counted = batch.token_mask[:, 1:]
    # Where a token is counted, the place before it is read.
    where = torch.nn.functional.pad(counted, (0, 1))
    logits = logits_at(model, where, input_ids=batch.input_ids, use_cache=False)
    log_probs = torch.zeros(counted.shape, device=model.device)
    return log_probs.masked_scatter(counted, target_log_probs(logits, batch.input_ids[:, 1:][counted]))
