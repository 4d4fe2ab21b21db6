"""Attacks by tuning: short fine-tunings at several rates, of every weight or of an adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import psutil
import torch

from expunge.audits.base import Advance, Case, Found, Tuned
from expunge.audits.subject import Subject
from expunge.data.batches import PAD_ID
from expunge.data.columns import Kind
from expunge.data.rows import Row
from expunge.data.sampling import EpochBatches
from expunge.data.tokenization import Example, encode_rows
from expunge.evaluation.passes import counted_log_probs
from expunge.maths.losses import cross_entropy
from expunge.models.kernels import fast_products
from expunge.models.lora import Adapter, LoraShape
from expunge.runs.planning import machine_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BASE_LEARNING_RATE = 5e-4
"""Up to width 256; a wider model takes proportionally less, 3e-5 at width 4096."""
LORA = LoraShape(rank=32, alpha=32.0, dropout=0.0, targets="all")
LORA_FACTOR = 10.0
"""LoRA's best rate in units of all weights'. Schulman et al., LoRA Without Regret, 2025."""
BYTES_A_PARAMETER = 16
"""Tuning all weights: they, their gradients and AdamW's two moments, each in float32."""
_WARMUP = 0.1
_MAX_NORM = 1.0
_EPOCH_SEEDS = 1_000_003


def default_learning_rate(width: int) -> float:
    """The rate of relearning for a model of this width, the same for every model of an audit."""
    return BASE_LEARNING_RATE * min(1.0, 256 / width)


def free_memory(device: str) -> int:
    """Bytes of a device that nobody uses now."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(int(psutil.virtual_memory().available), machine_memory())


def measured_steps(steps: int, measures: int) -> tuple[int, ...]:
    """When a tuned model is measured: `measures` times, evenly spaced, the last time at the end."""
    spaced = (round(steps * number / measures) for number in range(1, measures + 1))
    return tuple(sorted({max(1, step) for step in spaced}))


@dataclass(frozen=True, repr=False)
class Fold:
    """Rows that a model is tuned on, facts that it is asked for then, and retain rows as a control."""

    shown: Sequence[Row]
    asked: Sequence[Row]
    kept: Sequence[Row]


@dataclass(frozen=True)
class Tuning:
    """One way in which the model is tuned, always from its saved weights."""

    name: str
    learning_rate: float
    tuned: Tuned
    kind: Kind | None = None
    """Of the rows that it is tuned on; None: all."""


def tunings_of(case: Case, *, apart: bool) -> list[Tuning]:
    """Every tuning of the budget; with `apart` also those on rows of one kind, at the rate itself."""
    rate = case.learning_rate * (LORA_FACTOR if case.tuned == "lora" else 1)
    found = [Tuning(f"rate x{each:g}", each * rate, case.tuned) for each in case.budget.rates]
    if case.budget.lora and case.tuned == "full":
        found.append(Tuning("LoRA", LORA_FACTOR * rate, "lora"))
    if apart:
        found.append(Tuning("questions only", rate, case.tuned, "qa"))
        found.append(Tuning("documents only", rate, case.tuned, "sc"))
    return found


def asked_while_tuned(
    subject: Subject, case: Case, folds: Sequence[Fold], advance: Advance, *, apart: bool = False
) -> Found:
    """Scores of each fold's facts at the measured steps of every tuning, of its retain rows at the last.

    Rows and their order are those of the seed in every tuning. `apart` holds where every fold shows
    rows of both kinds.
    """
    budget = case.budget
    apart = apart and all({row.kind for row in fold.shown} == {"qa", "sc"} for fold in folds)
    tunings = tunings_of(case, apart=apart)
    steps = measured_steps(budget.steps, budget.measures)
    scores: dict[str, dict[str, float]] = {}
    texts: dict[str, dict[str, str]] = {}
    control: dict[str, dict[str, float]] = {}
    begun = 0
    for fold, tuning in product(folds, tunings):
        rows = [row for row in fold.shown if tuning.kind in (None, row.kind)]
        with subject.altered("float32" if case.tuned == "full" else None) as reader:
            adapter = None
            if tuning.tuned == "lora":
                adapter = Adapter(reader.model, subject.checked.layout, LORA, case.seed)
            for step in tuned(
                reader.model,
                encode_rows(rows, reader.tokenizer, reader.policy, eos=True),
                steps=budget.steps,
                rows=budget.tuning_rows,
                learning_rate=tuning.learning_rate,
                seed=case.seed,
                adapter=adapter,
            ):
                advance(begun + step, len(folds) * len(tunings) * budget.steps)
                if step in steps:
                    answers, name = reader.direct(fold.asked), _variant(tuning, step)
                    scores.setdefault(name, {}).update(answers.scores)
                    texts.setdefault(name, {}).update(answers.texts)
            kept = reader.direct(fold.kept).scores
            control.setdefault(_variant(tuning, budget.steps), {}).update(kept)
        del reader, adapter  # or the next model would be loaded beside this one
        begun += budget.steps
    return Found(
        scores,
        control=control,
        texts=texts,
        tunings={each.name: [_variant(each, step) for step in steps] for each in tunings},
        numbers={
            "tuned": "full weights" if case.tuned == "full" else "lora",
            "learning_rates": {each.name: each.learning_rate for each in tunings},
            "rows_tuned_on": [len(fold.shown) for fold in folds],
        },
    )


def _variant(tuning: Tuning, step: int) -> str:
    return f"{tuning.name}, step {step}"


def tuned(
    model: PreTrainedModel,
    examples: Sequence[Example],
    *,
    steps: int,
    rows: int,
    learning_rate: float,
    seed: int,
    adapter: Adapter | None = None,
) -> Iterator[int]:
    """Tunes `model`, or only its adapter, in place; yields after every step its number.

    AdamW on the mean loss of all tokens, betas .9 and .95, no decay, gradients clipped to norm 1,
    10% warm-up, then a constant rate. Without an adapter the model is in float32. It stays in eval
    mode: dropout would only add noise.
    """
    if adapter is None:
        parameters = list(model.requires_grad_(True).parameters())
    else:
        parameters = list(adapter.parameters.values())
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    warmup = max(1, round(_WARMUP * steps))
    batches = EpochBatches(
        examples,
        min(rows, len(examples)),
        PAD_ID,
        lambda epoch: torch.Generator().manual_seed(seed * _EPOCH_SEEDS + epoch),
    )
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, step / warmup)
        batch = batches.at(step).to(model.device)
        with torch.enable_grad(), fast_products(model.dtype, model.device):
            loss = cross_entropy(counted_log_probs(model, batch), batch.token_mask[:, 1:])
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, _MAX_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield step
