"""Memory of a run as a formula of shapes, phase by phase, in bytes.

    weights      b n                       n numbers of the model, b bytes of the run's dtype
    trained      4 t                       t trained numbers, float32
    optimiser    4 m t                     m moments
    gradients    4 t, or those of the largest matrix where each one moves in the backward pass
    whitening    2 sum of n^2               n inputs of a trained matrix, of `spectral`; 6 at the start
    activations  K b s l x                 x padded tokens of a step, l layers, s numbers that the linear
                                           maps of a layer take and give of a token
                 b d l x + K b s x'        with gradient checkpointing: x' tokens of the largest pass
    casts        2 t a pass                of trained weights to bfloat16, kept until the backward pass
    logits       b c v                     c counted tokens, vocabulary v, and a gradient for each loss
                 4 k p v                   k float32 copies of p tokens, a piece of them (`by_pieces`)

No weights are read and nothing is simulated. The constants are those of `benchmarks/plan.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch

from expunge.analysis.template_choice import PASS_ANSWERS
from expunge.data.batches import Batch, collate
from expunge.data.tokenization import Example
from expunge.maths.numerics import piece_rows
from expunge.methods.gradient import GradientSettings
from expunge.methods.jensun import JensUn
from expunge.methods.kl_minimization import KLMinimization
from expunge.methods.libu import LIBU
from expunge.methods.libu_published import PublishedLIBU
from expunge.methods.log_odds import TOP, LogOddsSettings
from expunge.methods.npo_merging import NPOMerging
from expunge.methods.rep_select import RepSelect
from expunge.methods.sam_npo import SamNPO
from expunge.methods.steering import TRAINED_LAYERS
from expunge.methods.token_npo import TokenNPO
from expunge.methods.undial import UNDIAL
from expunge.models.loading import CheckedModel
from expunge.runs.memory_parts import (
    ACTIVATIONS,
    CASTS,
    CONTEXT,
    CONTEXT_BYTES,
    COPIES,
    FILES,
    FREED_BESIDE_ADAPTER,
    GRADIENTS,
    KEPT,
    KEPT_IN_BFLOAT16,
    KEPT_OF_LAYER,
    LOGITS,
    MOST_PRODUCTS,
    OF_CPU,
    OPTIMIZER,
    PAGES,
    PROCESS,
    PRODUCT_BYTES,
    PRODUCTS,
    REFERENCE,
    ROUNDING,
    ROUNDING_SHARE,
    STEP_NUMBERS,
    TRAINED,
    WEIGHTS,
    Phase,
)
from expunge.runs.sizes import largest_batches, shapes_of, tokens_of
from expunge.segments.cache_layout import CacheLayout
from expunge.segments.engine import pass_tokens_on
from expunge.segments.states import DROP_AFTER
from expunge.training.preparation import Prepared

_ASK_TARGET = (KLMinimization, TokenNPO, UNDIAL, JensUn)
"""Methods that ask the target in every step."""
_CHECKED_ROWS = 3


class Formula:
    """The formula of one run; every method gives bytes."""

    def __init__(
        self,
        checked: CheckedModel,
        prepared: Prepared,
        dtype: torch.dtype,
        device_type: str,
        cache: CacheLayout | None,
        *,
        streamed: bool,
        chooses: bool = False,
        shards: int = 1,
    ) -> None:
        """`cache` is that of a method that runs layers alone, `streamed` says whether their weights are
        read as they are needed. `chooses`: whether the run looks for its layer first. `shards` is how
        many processes share the weights, and the rows of a step."""
        self._checked, self._prepared, self._method = checked, prepared, prepared.method
        self._device_type, self._cache, self._streamed = device_type, cache, streamed
        self._chooses, self._shards = chooses, shards
        self._listed = [example for example in prepared.retain if example.listed]
        self._others = [example for example in prepared.retain if not example.listed]
        self._log_odds = isinstance(prepared.method, LogOddsSettings)
        self._one_way = isinstance(prepared.method, RepSelect)
        self._shapes = shapes_of(checked, prepared.method)
        self._rounds = dtype != torch.float32
        self._item = dtype.itemsize
        self._trained = 4 * sum(self._shapes.trained)
        stored = next(iter(checked.files.tensors.values())).dtype
        self._mapped = device_type != "cuda" and stored == dtype
        self._pass_tokens = pass_tokens_on(device_type)
        self._segment = self._method.trained_layers(checked.layout)
        self._largest = largest_batches(prepared, None if cache is None else self._pass_tokens, shards)

    def phases(self, process: int) -> list[Phase]:
        """Every phase with what is held in it; `process` is what the process has without a model."""
        accelerator = self._device_type == "cuda"  # others share the memory of the processor
        run = self._of_whole() if self._cache is None else self._of_segment(self._cache)
        found = chain(self._of_base(), run)
        phases = []
        for name, parts in found:
            more = {}
            if ACTIVATIONS in parts:
                freed = FREED_BESIDE_ADAPTER * self._method.has_adapter * parts[ACTIVATIONS]
                more = {KEPT: round(freed), PRODUCTS: self._products()}
            if accelerator:
                tensors = sum(size for part, size in parts.items() if part not in OF_CPU)
                more = {ROUNDING: round(ROUNDING_SHARE * tensors)}
            held = {part: size for part, size in {**parts, **more}.items() if size}
            here = {k: v for k, v in held.items() if not accelerator or k not in OF_CPU}
            there = {k: v for k, v in held.items() if accelerator and k in OF_CPU}
            if not accelerator:
                here = {PROCESS: process, **here}
            elif name == "write":
                here = {}
            else:
                here = {CONTEXT: CONTEXT_BYTES, **here}
            phases.append(Phase(name, here, {PROCESS: process, **there} if accelerator else {}))
        return phases

    @property
    def step_tokens(self) -> float:
        """Tokens of the rows of a step, the mean."""
        return self._largest.tokens

    def _products(self) -> int:
        """What a processor's library keeps of products: of each pass of another size forwards, and in
        training two backwards."""
        if not torch.backends.mkldnn.is_available():
            return 0
        prepared, size = self._prepared, self._prepared.used.batch_size
        scored = [rows for rows in prepared.validation.sides if prepared.measures]
        filled = 0
        if self._cache is not None:
            filled = self._cache.tokens // self._pass_tokens
        elif self._log_odds:
            scored += [prepared.forget, self._listed]
        passes = filled + sum(len(rows) // size + 1 for rows in scored)
        maps = self._shapes.compiled(self._item)
        return PRODUCT_BYTES * min(MOST_PRODUCTS, maps * (3 * self._largest.sizes + passes))

    @property
    def state_bytes(self) -> int:
        """Size on disk of a saved state: parameters, optimiser, and the best candidate's parameters."""
        copies = 2 if self._prepared.measures else 1
        return (copies + self._one_way) * self._trained + self._optimizer()

    def _of_base(self) -> Iterator[tuple[str, dict[str, int]]]:
        """The pass of the base over the forget rows, if it is the reference; then it is let go."""
        if self._prepared.yardstick == "base":
            weights = {WEIGHTS: self._item * self._shapes.numbers // self._shards}
            yield "ask base", {**weights, **self._measured()}

    def _of_whole(self) -> Iterator[tuple[str, dict[str, int]]]:
        read = 0 if self._mapped else self._checked.files.bytes
        numbers = self._shapes.numbers
        yield "load", {WEIGHTS: self._item * numbers // self._shards, FILES: read}
        held = self._held(numbers)
        moments = {REFERENCE: held[REFERENCE] + 4 * self._shapes.white}
        yield "start", {**held, **moments, **self._start()}
        held |= {OPTIMIZER: self._shared(self._optimizer()), COPIES: self._best() + self._said()}
        yield "train", {**held, **self._step()}
        if self._prepared.measures:
            yield "measure", {**held, **self._measured()}
        yield from self._ends(held)

    def _of_segment(self, cache: CacheLayout) -> Iterator[tuple[str, dict[str, int]]]:
        shapes = self._shapes
        first, last = self._segment or (0, 0)

        def weights(layers: int, outside: int) -> dict[str, int]:
            numbers = layers * shapes.layer + outside if self._streamed else shapes.numbers
            return {WEIGHTS: self._item * numbers}

        if not self._streamed:
            yield "load", {**weights(0, 0), FILES: 0 if self._mapped else self._checked.files.bytes}
        pages = {PAGES: min(cache.bytes, 2 * DROP_AFTER)}
        embedding = shapes.outside - shapes.head or shapes.outside
        longest = max(map(len, [*self._prepared.forget, *self._prepared.retain]))
        asks = self._prepared.plain is not None or self._prepared.looks
        tokens = self._pass_tokens if self._chooses or asks else _CHECKED_ROWS * longest
        scores = max(self._prepared.measures * _CHECKED_ROWS * longest, asks * PASS_ANSWERS)
        logits = {LOGITS: 2 * self._item * scores * shapes.vocabulary}
        yield "check", {**weights(1, shapes.outside), **self._pass(tokens), **logits}
        filled = min(self._pass_tokens + longest, cache.tokens)
        yield "fill", {**weights(last - first + 1, embedding), **self._pass(filled), **pages}
        below = first if cache.missing else 0
        above = shapes.layers - 1 - last if self._prepared.measures else 0
        outside = shapes.head * self._prepared.measures + embedding * bool(cache.missing)
        held = weights(last - first + 1 + below + above, outside)
        held[WEIGHTS] -= self._item * sum(shapes.trained)
        held |= {TRAINED: self._trained * (2 if cache.missing else 1), **pages}
        held |= {OPTIMIZER: self._optimizer(), COPIES: self._best()}
        yield "train", {**held, **self._step()}
        if self._prepared.measures:
            yield "measure", {**held, **self._measured()}
        yield from self._ends(held)

    def _ends(self, held: Mapping[str, int]) -> Iterator[tuple[str, dict[str, int]]]:
        result = 4 * sum(self._shapes.changed)
        yield "finish", {**held, COPIES: held[COPIES] + result}
        stored = self._checked.files.tensors.values()
        largest = max(tensor.bytes for tensor in stored)
        # Written, the new and the old tensor, both in float32 as well, and their difference; then the
        # result as a whole, or layer by layer, beside one tensor that it is compared with.
        replaced = 5 * 4 * max(self._shapes.changed)
        reloaded = 0 if self._streamed else sum(tensor.bytes for tensor in stored)
        yield "write", {COPIES: result, FILES: max(replaced, reloaded + largest)}

    def _held(self, numbers: int) -> dict[str, int]:
        """Weights as they are while a method works on a whole model."""
        shapes = self._shapes
        exchanged = 0 if self._method.has_adapter else sum(shapes.trained)
        frozen = numbers if self._mapped and self._rounds else numbers - exchanged
        # Of sharded weights two layers and what is in none are whole while they are used.
        whole = 2 * shapes.layer + shapes.outside if self._shards > 1 else 0
        copies = 1
        if isinstance(self._method, _ASK_TARGET) or self._segment is not None:
            copies = 1 if self._method.has_adapter else 2  # those from before are swapped in
        return {
            WEIGHTS: self._item * (frozen // self._shards + whole),
            TRAINED: copies * self._shared(self._trained),
            REFERENCE: self._reference(),
        }

    def _shared(self, size: int) -> int:
        """What a process holds of what is trained: its shard of full weights, all of an adapter."""
        return size if self._method.has_adapter else size // self._shards

    def _best(self) -> int:
        return self._shared(self._trained) if self._prepared.measures else 0

    def _optimizer(self) -> int:
        if self._one_way:
            return 0
        muon = self._log_odds or getattr(self._method, "optimizer", "") == "muon"
        return (1 if muon else 2) * self._trained

    def _reference(self) -> int:
        """Log-odds of the user's tokens, what makes inputs white, in bfloat16; or the way to go."""
        rows = (self._prepared.forget, self._listed) if self._log_odds else ()
        odds = 4 * sum(tokens_of(side, packed=False) for side in rows)
        return odds + 2 * self._shapes.white + self._one_way * self._trained

    def _said(self) -> int:
        """The likeliest tokens after those that the target wrote."""
        return 8 * TOP * sum(map(len, self._others)) if self._log_odds else 0

    def _step(self) -> dict[str, int]:
        """A training step: its passes, or the move after them, whichever takes more."""
        shapes = self._shapes
        batches, accumulates = self._largest.batches, self._largest.accumulates
        graphs = 2 if isinstance(self._method, NPOMerging) else 1
        tokens = [graphs * batch.input_ids.numel() for batch in batches]
        if self._cache is not None:
            tokens = [sum(sum(batch.lengths) for batch in batches)]  # packed
        layers = shapes.layers if self._segment is None else TRAINED_LAYERS
        passes = {} if self._one_way else self._graph(tokens, layers)
        if self._segment is None and not self._one_way:
            passes[LOGITS] = graphs * self._logits(batches)
        gradients = self._shared(self._trained)
        largest = 4 * max(shapes.trained)
        move = STEP_NUMBERS * largest
        if (self._log_odds or self._one_way) and self._shards == 1 and not accumulates:
            return {**passes, GRADIENTS: largest + move}
        if self._device_type == "cuda" and self._optimizer() > self._trained:
            move = gradients  # PyTorch moves all at once there
        if isinstance(self._method, SamNPO):
            passes[GRADIENTS] = 2 * gradients  # the way to the weights nearby, and these
        if accumulates:
            passes[GRADIENTS] = gradients
        return max(passes, {GRADIENTS: gradients + move}, key=lambda parts: sum(parts.values()))

    def _graph(self, tokens: Sequence[int], layers: int) -> dict[str, int]:
        """What passes of so many padded tokens keep for the backward pass, all at once."""
        shapes, method = self._shapes, self._method
        casts_more = method.has_adapter or isinstance(method, GradientSettings | RepSelect)
        share = KEPT_IN_BFLOAT16 if self._rounds and casts_more else KEPT_OF_LAYER
        of_layer = share * self._item * shapes.flow
        casts = 0
        if self._rounds and not method.has_adapter and self._shards == 1:
            casts = self._item * sum(shapes.trained)
        if getattr(method, "gradient_checkpointing", False):
            kept = self._item * shapes.width * layers * sum(tokens) + 2 * of_layer * max(tokens)
            return {ACTIVATIONS: round(kept), CASTS: casts // shapes.layers}
        kept = of_layer * (layers * sum(tokens) + max(tokens))
        return {ACTIVATIONS: round(kept), CASTS: casts * len(tokens)}

    def _pass(self, tokens: int) -> dict[str, int]:
        """A pass without gradients: what one layer makes and drops."""
        return {ACTIVATIONS: round(KEPT_OF_LAYER * self._item * self._shapes.flow * tokens)}

    def _logits(self, batches: Sequence[Batch]) -> int:
        """What the losses keep of the logits of counted tokens, and the largest gradient of them."""
        method: Any = self._method
        log_odds = self._log_odds
        counts = [
            int(batch.mask("all" if log_odds and number else method.tokens)[:, 1:].sum())
            for number, batch in enumerate(batches)
        ]
        if log_odds:
            lens = 2 if method.lens_weight > 0 and self._shapes.layers > 1 else 1
            kept, copies = [lens, 1, 1], [lens + (5 if self._matches else 0), 1, 2]
        else:
            divergence = getattr(method, "kl_weight", 0) > 0
            divergence |= isinstance(method, (KLMinimization, JensUn))
            distils = isinstance(method, UNDIAL)  # what the target says, and what is to be said
            kept = [3 if distils else 1, 2 if divergence else 1, 1]
            copies = [3 if distils else 1, 3 if divergence else 1, 1]
        whole = sum(n * times for n, times in zip(counts, kept, strict=False)) + 3 * max(counts)
        pieces = [self._pieces(n, k + 2) for n, k in zip(counts, copies, strict=False)]
        return self._item * self._shapes.vocabulary * whole + sum(pieces)

    def _pieces(self, tokens: int, copies: int) -> int:
        """So many float32 copies of the logits of one piece of the tokens."""
        vocabulary = self._shapes.vocabulary
        return 4 * copies * vocabulary * min(tokens, piece_rows(self._device_type, vocabulary))

    @property
    def _matches(self) -> bool:
        """Whether tokens are calibrated one by one."""
        validation = self._prepared.validation
        return bool(validation.members) and validation.tokens is not None

    def _start(self) -> dict[str, int]:
        """What a method computes before its first step: scores, for LIBU with gradients."""
        method: Any = self._method
        if self._segment is not None:
            return {}
        size = self._prepared.used.batch_size
        asked = (self._prepared.forget, self._listed, self._prepared.preferred)
        sides = [_longest(rows, size) for rows in asked if rows]
        batches = [collate(rows, range(len(rows)), self._prepared.pad_id) for rows in sides]
        tokens = max(batch.input_ids.numel() for batch in batches)
        counted = max(int(batch.mask(method.tokens)[:, 1:].sum()) for batch in batches)
        whole = self._item * counted * self._shapes.vocabulary
        logits = {LOGITS: whole + self._pieces(counted, 2)}
        if self._one_way:  # the gradient becomes the way, in float64 matrix by matrix
            return {**self._graph([tokens], self._shapes.layers), **logits}
        if not isinstance(method, (LIBU, PublishedLIBU)):
            return {**self._pass(tokens), **logits}
        bases = 0
        if isinstance(method, LIBU) and method.preconditioner == "ekfac":
            # Of the outputs' factors: covariances, and eigenvectors in float64.
            outputs = [numbers // method.rank for numbers in self._shapes.trained[::2]]
            bases = sum(12 * count**2 for count in outputs)
        fisher = {GRADIENTS: 4 * self._trained + bases}
        return {**self._graph([tokens], self._shapes.layers), **logits, **fisher}

    def _measured(self) -> dict[str, int]:
        """The largest pass over rows that candidates are measured on."""
        size = self._prepared.used.batch_size
        batches = [_longest(rows, size) for rows in self._prepared.validation.sides if rows]
        padded = max((len(rows) * len(rows[-1]) for rows in batches), default=0)
        if self._cache is not None:
            tokens = max((sum(map(len, rows)) for rows in batches), default=0)
            copies = 0
        else:
            tokens = padded
            copies = 7 if self._matches else 2  # log-probabilities, and the surprise of matched tokens
        whole = self._item * tokens * self._shapes.vocabulary
        return {**self._pass(tokens), LOGITS: whole + self._pieces(tokens, copies)}


def _longest(examples: Sequence[Example], count: int) -> list[Example]:
    """So many of the longest examples, the longest last."""
    return sorted(examples, key=len)[-count:] if count else []
