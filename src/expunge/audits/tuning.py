"""A short fine-tuning of all weights in float32, as attacks by relearning use it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from expunge.audits.base import Case
from expunge.audits.subject import Answers, Reader
from expunge.data.rows import Row
from expunge.data.sampling import EpochBatches
from expunge.data.tokenization import Example, encode_rows
from expunge.evaluation.membership import counted_log_probs
from expunge.methods.losses import cross_entropy
from expunge.models.kernels import fast_products
from expunge.models.loading import pad_id_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BASE_LEARNING_RATE = 5e-4
"""Up to width 256; a wider model takes proportionally less, 3e-5 at width 4096."""
_WARMUP = 0.1
_MAX_NORM = 1.0
_EPOCH_SEEDS = 1_000_003


def default_learning_rate(width: int) -> float:
    """The rate of relearning for a model of this width, the same for every model of an audit."""
    return BASE_LEARNING_RATE * min(1.0, 256 / width)


def measured_steps(steps: int, measures: int) -> tuple[int, ...]:
    """When a tuned model is measured: `measures` times, evenly spaced, the last time at the end."""
    spaced = (round(steps * number / measures) for number in range(1, measures + 1))
    return tuple(sorted({max(1, step) for step in spaced}))


def asked_while_tuned(
    reader: Reader,
    rows: Sequence[Row],
    facts: Sequence[Row],
    case: Case,
    advance: Callable[[int], None],
) -> Iterator[tuple[str, Answers]]:
    """Tunes the reader's model on the rows, and asks for the facts at the measured steps of the budget.

    Yields the step's name and the answers; `advance` is called with every step's number.
    """
    budget = case.budget
    examples = encode_rows(rows, reader.tokenizer, reader.policy, eos=True)
    for step in tuned(
        reader.model,
        reader.tokenizer,
        examples,
        steps=budget.steps,
        rows=budget.tuning_rows,
        learning_rate=case.learning_rate,
        seed=case.seed,
    ):
        advance(step)
        if step in measured_steps(budget.steps, budget.measures):
            yield f"step {step}", reader.direct(facts)


def tuned(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    steps: int,
    rows: int,
    learning_rate: float,
    seed: int,
) -> Iterator[int]:
    """Tunes `model`, which is in float32, in place; yields after every step its number.

    AdamW on the mean loss of all tokens, betas .9 and .95, no decay, gradients clipped to norm 1,
    10% warm-up, then a constant rate. The model stays in eval mode: dropout would only add noise.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0
    )
    model.requires_grad_(True)
    warmup = max(1, round(_WARMUP * steps))
    batches = EpochBatches(
        examples,
        min(rows, len(examples)),
        pad_id_of(tokenizer),
        lambda epoch: torch.Generator().manual_seed(seed * _EPOCH_SEEDS + epoch),
    )
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, step / warmup)
        batch = batches.at(step).to(model.device)
        with torch.enable_grad(), fast_products(model.dtype, model.device):
            loss = cross_entropy(counted_log_probs(model, batch), batch.token_mask[:, 1:])
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), _MAX_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield step
