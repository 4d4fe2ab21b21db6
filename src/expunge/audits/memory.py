"""Memory of an audit, said before its first attack: the formula of a run (`training.memory`) for what it
does to each model, one model at a time.

    ask     b n + K b s x + 2 b d l x + b x v    b bytes a number, x tokens of a batch, width d
    tune    16 n + K 4 s l x + 4 (4 x v)         every weight, its gradient and two moments in float32
            b n + 16 a + K b s l x + 4 b x v     or the a numbers of an adapter alone
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from expunge.audits.base import Tuned
from expunge.audits.budgets import Budget
from expunge.audits.tuning import BYTES_A_PARAMETER, LORA
from expunge.evaluation.batches import rows_within
from expunge.maths.numerics import piece_rows
from expunge.methods.gradient_ascent import GradientAscent
from expunge.models.loading import CheckedModel, Dtype
from expunge.runs.memory_parts import (
    ACTIVATIONS,
    CONTEXT,
    CONTEXT_BYTES,
    FREED_BESIDE_ADAPTER,
    KEPT,
    KEPT_IN_BFLOAT16,
    KEPT_OF_LAYER,
    LOGITS,
    MOST_PRODUCTS,
    PRODUCT_BYTES,
    PRODUCTS,
    ROUNDING,
    ROUNDING_SHARE,
    STEP_NUMBERS,
    WEIGHTS,
    Phase,
)
from expunge.runs.sizes import shapes_of

TUNED = "what is tuned, its gradients and moments"
CACHE = "keys and values"
_READ, _TUNED = 1, 4
"""Copies of a pass's logits in its dtype: reading keeps them, tuning also what their gradient takes."""
_PIECE = 3
"""Float32 copies of the logits of one piece of the tokens (`by_pieces`)."""
_FREED = 0.4
"""On a processor: pieces that are freed between kept ones and not given back, as a share of the
activations, measured on one model of 8 layers and width 512; beside an adapter also its own share."""

_UNTUNED = "direct,paraphrase,sample,verbatim,ablate,quantize"
"""Attacks that tune nothing and need no more than the rows."""


@dataclass(frozen=True)
class Sizes:
    """What of the rows and the budget the memory follows from."""

    longest: int
    """Tokens of the longest row that is asked or read, with those that an answer may take beyond it."""
    longest_tuned: int
    """Tokens of the longest row that is tuned on; 0 where no attack tunes."""
    batch_size: int
    budget: Budget


def audit_phases(
    checked: CheckedModel, dtype: Dtype, device_type: str, sizes: Sizes, tuned: Tuned
) -> list[Phase]:
    """The highest moments of asking and of tuning, in bytes by part, beside what the process holds.

    From the configuration and the shapes of the tensors; no weights are read.
    """
    method = GradientAscent(parameters="lora", rank=LORA.rank, targets=LORA.targets)
    shapes = shapes_of(checked, method)
    item = getattr(torch, dtype).itemsize
    gpu = device_type == "cuda"
    tokens = sizes.longest * rows_within(sizes.longest, sizes.batch_size, torch.device(device_type))
    ask = {
        WEIGHTS: item * shapes.numbers,
        ACTIVATIONS: round(KEPT_OF_LAYER * item * shapes.flow * tokens),
        CACHE: 2 * item * shapes.width * shapes.layers * tokens,
        LOGITS: _logits(item, shapes.vocabulary, tokens, _READ, device_type),
    }
    phases = [_phase("ask", ask, gpu=gpu)]
    if not sizes.longest_tuned:
        return phases
    tokens = sizes.longest_tuned * sizes.budget.tuning_rows
    kept, freed = KEPT_OF_LAYER, _FREED
    if tuned == "full":
        item, weights, held = 4, 0, BYTES_A_PARAMETER * shapes.numbers
        largest = max(shapes.head, shapes.layer)
    else:
        weights, held = item * shapes.numbers, BYTES_A_PARAMETER * sum(shapes.trained)
        largest = max(shapes.trained)
        kept, freed = KEPT_IN_BFLOAT16 if item < 4 else kept, _FREED + FREED_BESIDE_ADAPTER
    graph = round(kept * item * shapes.flow * (shapes.layers + 1) * tokens)
    logits = _logits(item, shapes.vocabulary, tokens, _TUNED, device_type)
    passed = {ACTIVATIONS: graph, LOGITS: logits}
    # PyTorch moves all numbers at once on a GPU, one tensor at a time elsewhere.
    move = held // 4 if gpu else 4 * STEP_NUMBERS * largest
    if move > sum(passed.values()):
        passed = {ACTIVATIONS: move}
    tune = {WEIGHTS: weights, TUNED: held, **passed}
    if not gpu:
        products = PRODUCT_BYTES * min(MOST_PRODUCTS, 3 * shapes.compiled(item) * sizes.budget.steps)
        tune |= {KEPT: round(freed * graph), PRODUCTS: products}
    return [*phases, _phase("tune", tune, gpu=gpu)]


def _logits(item: int, vocabulary: int, tokens: int, copies: int, device_type: str) -> int:
    piece = min(tokens, piece_rows(device_type, vocabulary))
    return vocabulary * (copies * item * tokens + 4 * _PIECE * piece)


def _phase(name: str, parts: Mapping[str, int], *, gpu: bool) -> Phase:
    held = {part: size for part, size in parts.items() if size}
    if gpu:
        held |= {CONTEXT: CONTEXT_BYTES, ROUNDING: round(ROUNDING_SHARE * sum(held.values()))}
    return Phase(name, held, {})


@dataclass(frozen=True)
class PlannedAudit:
    """What an audit takes in the memory that it is given."""

    tuned: Tuned
    phases: Sequence[Phase]
    fits: bool
    mend: str
    """Options that make it fit, where it does not."""

    @property
    def peak(self) -> int:
        """Bytes of the phase that takes most."""
        return max(phase.bytes for phase in self.phases)


def plan_audit(
    checked: CheckedModel,
    dtype: Dtype,
    device_type: str,
    sizes: Sizes,
    ways: Sequence[Tuned],
    free: int,
) -> PlannedAudit:
    """By the first way to tune that `free` bytes hold; where they hold none, by the last, and a mend."""

    def phases(tuned: Tuned, dtype: Dtype = dtype, sizes: Sizes = sizes) -> list[Phase]:
        return audit_phases(checked, dtype, device_type, sizes, tuned)

    def fits(found: list[Phase]) -> bool:
        return max(phase.bytes for phase in found) <= free

    for tuned in ways:
        found = phases(tuned)
        if fits(found):
            return PlannedAudit(tuned, found, True, "")
    one = replace(sizes, batch_size=1)
    mends = {
        "--tuning lora": phases("lora"),
        "--batch-size 1": phases(tuned, sizes=one),
        "--dtype bfloat16": phases(tuned, "bfloat16"),
        "--tuning lora --dtype bfloat16 --batch-size 1": phases("lora", "bfloat16", one),
        f"--attacks {_UNTUNED}": phases(tuned, sizes=replace(sizes, longest_tuned=0)),
    }
    enough = next((f"use {option}" for option, less in mends.items() if fits(less)), None)
    return PlannedAudit(tuned, found, False, enough or "use a machine with more memory")
