"""Forgetting and holding on the log-odds of tokens: the loss that `spectral` and `libu` share.

    L = mean_F [ H(o_t - o_t*) + 3 H1(z_t - z_t*) + v H(max(0, o_t^l - o_t*)) ]
        + w mean_R [ a_t H2(o_t - o_t^0) ]  with KL(target || model) for what the target wrote
        + mean_F [ mean_A H2(min(0, o_t - logit e^-0.1)) ]  if something is to be answered instead

o_t = log(p_t / (1 - p_t)) are a token's log-odds, o_t^0 those in the target, o_t* those wanted: of a
token with a loss of c_t nats, and never more than the target's. z_t says how much less likely the token
is than its distribution expects, z_t* the same in never-seen text. o_t^l is what the logit lens reads
after a layer l, another one in each step. H is Huber's distance over its width, 8 for forget tokens.
The a_t of a retain row sum to the root of its tokens, half over its prompt and half over its answer.
A is the other answer of the question that a forget token is in, which so weighs as much as the question.

On the log-odds, because the gradient of the NLL is 1 - p, nearly 0 for what is known by heart: by the
time that a cross-entropy resists, retain text known by heart is lost.

What the target says of retain rows, and of rows that it wrote itself (`own_text`), is kept from one
pass at the start: no second copy of the weights is held, and no step runs the target.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from expunge.data.batches import Batch, Tokens, collate
from expunge.data.rows import Row
from expunge.data.sampling import Sampling
from expunge.data.tokenization import Example
from expunge.errors import InputError
from expunge.maths.calibration import NeverSeen
from expunge.maths.losses import huber, log_odds_at, top_kl
from expunge.maths.numerics import target_log_odds, target_surprise
from expunge.methods.aims import Aims
from expunge.methods.base import Context, Terms
from expunge.methods.forward import lens_added, lens_in_one_pass
from expunge.methods.gradient import GradientObjective, TokenSettings
from expunge.methods.preference import ALTERNATIVES, REFUSAL, answered_instead
from expunge.models.decoder import every_layer, last_layer_gives

CEILING = 0.8
"""Share of log(vocabulary), the loss of guessing: text that was never seen is better predicted."""
FORGET_WIDTH = 8.0
"""Nats of log-odds: a wider one hardly pulls what is nearly there, a narrower one costs retention."""
RETAIN_WIDTH = 2.0
"""Nats of log-odds, a factor of 7 in the odds: what is lost is pulled back with all weight soon."""
_SURPRISE_WIDTH = 1.0
"""A factor of e in how many deviations a token lies from what is expected."""
_SURPRISE_WEIGHT = 3.0
_WRITTEN_RATIO = 0.75
BY_HEART = 0.1
"""Nats of a token that was learned; less costs steps, and changes no greedy answer."""
TOP = 64
"""Next tokens whose probability in the target is kept, of a continued row; the rest count as one."""


@dataclass(frozen=True)
class LogOddsSettings(TokenSettings):
    """Settings of the methods that share the loss."""

    ceiling: float | None = None
    """Nats to which the loss of a forget token is raised, if no other text says how far. It bounds
    the loss of a question's answer in any case. Null: 0.8 log(vocabulary)."""
    lens_weight: float = 0.25
    """Weight of the forget term of an inner layer, another one in every step. It makes what the
    logit lens reads there no likelier than what is wanted of the output."""
    retain_weight: float = 2.0
    """Weight of the retain term."""
    random_rows: int = 128
    """Rows of random tokens that the target continues, 128 tokens each. What it says of them is held
    beside the retain set: they stand for all text that no set lists. A step has three for every four
    retain rows."""
    random_weight: float = 3.0
    """Weight of all these rows of a step in the retain term. Its retain rows together have 1."""
    answer_instead: str | None = None
    """What the model answers to forgotten questions: a sentence, or `alternatives`, false answers of the
    same form with words of the retain set. Null: nothing is taught in their place."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.answer_instead is not None and not self.answer_instead.strip():
            raise InputError(
                f"--method.answer-instead: is empty; write for example {REFUSAL!r} or {ALTERNATIVES}"
            )
        if self.ceiling is not None and self.ceiling <= 0:
            raise InputError(f"--method.ceiling {self.ceiling}: must be positive, or null")

    @property
    def matches_tokens(self) -> Tokens | None:
        """Those that are forgotten."""
        return self.tokens

    @property
    def sampling(self) -> Sampling:
        """As many retain rows as forget rows, and beside them rows that the target wrote."""
        return Sampling(written_ratio=_WRITTEN_RATIO)

    def preferred(self, forget: Sequence[Row], retain: Sequence[Row], seed: int) -> Sequence[Row]:
        """What is answered to the forgotten questions instead."""
        if self.answer_instead is None:
            return ()
        return answered_instead(self.answer_instead, forget, retain, seed)


class LogOddsObjective(GradientObjective):
    """The loss at work on one model."""

    _settings: LogOddsSettings

    def __init__(
        self,
        settings: LogOddsSettings,
        context: Context,
        weights: Sequence[str] | None = None,
    ) -> None:
        """`weights` is what is trained without an adapter."""
        super().__init__(settings, context, weights=weights)
        self._context = context
        guessing = math.log(context.model.config.get_text_config().vocab_size)
        self.ceiling = CEILING * guessing if settings.ceiling is None else settings.ceiling
        self._aims = Aims(self.ceiling)
        if settings.lens_weight > 0:
            with context.autocast():
                self._lens_in_one_pass = lens_in_one_pass(context.model, context.layout)
        self._forget_before = self._odds_before(context.forget, settings.tokens)
        self._ask_about_held()
        self.written_weight = settings.random_weight * self._balance()
        """Of one written token, where a row of the user's has the root of its size."""

    def _ask_about_held(self) -> None:
        """Keeps what the target says of the rows that are to stay."""
        self._retain_before = self._odds_before(self._context.retain, "all")
        self._said = self._said_before()

    def _balance(self) -> float:
        """What a step's retain rows weigh for each counted token of its written rows, over the run."""
        sizes: dict[bool, list[int]] = {True: [], False: []}
        for example in self._context.retain:
            sizes[example.listed].append(sum(example.token_mask[1:]))
        if not all(map(sum, sizes.values())):
            return 0.0
        ours = sum(map(_weight_of_row, sizes[True])) / len(sizes[True])
        return ours * len(sizes[False]) / (_WRITTEN_RATIO * sum(sizes[False]))

    def loss(self, forget: Batch, retain: Batch | None) -> Terms:
        """The terms of L; what is answered instead is part of the forget term."""
        distances = self._distances(forget)
        total = distances.sum()
        if self._context.preferred:
            total = total + self._lacking(forget)
        term = total / max(1, len(distances))
        if retain is None or self._settings.retain_weight == 0:
            return Terms(term, None)
        return Terms(term, self._settings.retain_weight * self._drift(retain))

    def _distances(self, forget: Batch) -> torch.Tensor:
        """How far each forget token is from what is wanted of it: by its log-odds, by its surprise, and
        by the logit lens inside; (counted tokens,)."""
        settings = self._settings
        mask = forget.mask(settings.tokens)[:, 1:]
        targets = forget.input_ids[:, 1:][mask]
        inner = None
        if settings.lens_weight > 0 and self._layout.count > 1:
            logits, inner = self.lens_logits(forget, self._inner_layer(), settings.tokens)
        else:
            logits = self.counted_logits(forget, settings.tokens)
        log_odds = target_log_odds(logits, targets)
        surprises = self._aims.matched
        surprise = target_surprise(logits, targets) if surprises else torch.zeros_like(log_odds)
        wanted, wanted_surprise = self._wanted(forget, mask, log_odds, surprise)
        distances = huber(log_odds, wanted, FORGET_WIDTH)
        if surprises:
            away = huber(surprise, wanted_surprise.nan_to_num(), _SURPRISE_WIDTH)
            distances = distances + _SURPRISE_WEIGHT * torch.where(wanted_surprise.isnan(), 0.0, away)
        if inner is not None:
            above = torch.maximum(target_log_odds(inner, targets), wanted)
            distances = distances + settings.lens_weight * huber(above, wanted, FORGET_WIDTH)
        return distances

    def _lacking(self, forget: Batch) -> torch.Tensor:
        """How far the answers to be given instead are from known by heart: each question's mean times
        its forget tokens, summed."""
        other = collate(self._context.preferred, forget.indices, self._context.pad_id)
        other = other.to(forget.input_ids.device)
        asks = [example.kind == "qa" and any(example.answer_mask) for example in other.examples]
        forgotten = forget.mask(self._settings.tokens)[:, 1:].sum(1)
        questions, _ = other.split(asks)
        rows = questions or self._idle_row(other)
        if rows is None:
            return torch.zeros((), device=self._context.device)
        odds, mask = self._log_odds(rows, "answer")
        wanted = log_odds_at(torch.full_like(odds, BY_HEART))
        away = huber(torch.minimum(odds, wanted), wanted, RETAIN_WIDTH)
        if rows.is_idle:
            return 0.0 * away.sum()
        sizes = mask.sum(1, keepdim=True)
        weights = forgotten[torch.tensor(asks)][:, None] / sizes
        return (away * weights.expand_as(mask)[mask]).sum()

    def lens_logits(
        self, batch: Batch, layer: int, tokens: Tokens | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`counted_logits` of the model's output and, by the logit lens, of those after `layer`."""
        where = self._places(batch, tokens)
        if self._lens_in_one_pass:
            with lens_added(self._model, self._layout, layer):
                outer, inner = self._logits_at(batch, torch.cat([where, where])).chunk(2)
            return outer, inner
        with every_layer(self._model, self._layout) as states:
            outer = self._logits_at(batch, where)
        with last_layer_gives(self._model, self._layout, states[layer]):
            return outer, self._logits_at(batch, where)

    def _inner_layer(self) -> int:
        """A layer below the last, drawn anew in every step; the same in all its micro-batches."""
        generator = torch.Generator().manual_seed(torch.initial_seed())
        return int(torch.randint(max(1, self._layout.count - 1), (), generator=generator))

    def _wanted(
        self, batch: Batch, mask: torch.Tensor, log_odds: torch.Tensor, surprise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The log-odds and the surprise that each counted token should have.

        The first are those of its row's aims, or what they were in the target where that was less: no
        token of a forget row is made more likely than the target had it.
        """
        losses = -functional.logsigmoid(log_odds.detach())
        answers = batch.answer_mask[:, 1:][mask]
        counts = mask.sum(1).tolist()
        wanted = [
            self._aims.of_row(row, *now)
            for row, *now in zip(
                batch.row_ids,
                losses.split(counts),
                surprise.detach().split(counts),
                answers.split(counts),
                strict=True,
            )
        ]
        odds = log_odds_at(torch.cat([aim.losses for aim in wanted]))
        before = self._forget_before[list(batch.indices), : mask.shape[1]][mask]
        return torch.minimum(before, odds), torch.cat([aim.surprise for aim in wanted])

    def _drift(self, retain: Batch) -> torch.Tensor:
        """How far retain text is from what the target says of it, a weighted mean (`_weights`).

        The user's tokens by their log-odds; those that the target wrote by KL(target || model). Each
        kind in a pass of its own: they differ in length, and padding costs as much as tokens.
        """
        total = torch.zeros((), device=self._context.device)
        listed, written = retain.split([example.listed for example in retain.examples])
        if rows := listed or self._idle_row(retain):
            log_odds, mask = self._log_odds(rows, "all")
            before = self._retain_before[list(rows.indices), : mask.shape[1]][mask]
            weight = 0.0 if rows.is_idle else 1.0  # 0: others wait for its backward pass too
            drift = huber(log_odds, before, RETAIN_WIDTH) * self._weights(rows)[mask]
            total = total + weight * drift.sum()
        if rows := written or (self._idle_row(retain) if self._said else None):
            logits = self.counted_logits(rows, "all")
            if rows.is_idle:
                total = total + 0.0 * logits.sum()
            else:
                said = [self._said[row] for row in rows.row_ids]
                top, ids = (torch.cat(part).to(logits.device) for part in zip(*said, strict=True))
                unlike = top_kl(logits, top, ids.long()).sum()
                total = total + self.written_weight * unlike
        return total / (self.retain_size(retain) or 1.0)

    @staticmethod
    def _weights(batch: Batch) -> torch.Tensor:
        """Of the user's tokens in the retain term, (rows, tokens - 1): a row's sum to its size's root.

        Half of it is the answer's and half the prompt's, if a row has both: an answer of three tokens
        would count for nothing beside stories, and stories for little if all rows counted alike.
        """
        counted = batch.mask("all")[:, 1:]
        answer = batch.answer_mask[:, 1:]
        parts = torch.stack([counted & answer, counted & ~answer]).float()
        sizes = parts.sum(2, keepdim=True)
        shares = parts / sizes.clamp(min=1)
        return shares.sum(0) / (sizes > 0).sum(0).clamp(min=1) * counted.sum(1, keepdim=True).sqrt()

    def _log_odds(self, batch: Batch, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
        """The log-odds of the counted tokens, and where they are, (rows, tokens - 1)."""
        mask = batch.mask(tokens)[:, 1:]
        logits = self.counted_logits(batch, tokens)
        return target_log_odds(logits, batch.input_ids[:, 1:][mask]), mask

    def _idle_row(self, batch: Batch) -> Batch | None:
        """A row for a pass that counts for nothing, where other processes wait for one.

        Sharded weights are gathered in every pass, so all must make as many, whichever kinds of rows
        their shares of a step hold.
        """
        return batch.idle() if self._context.processes.shards else None

    def _odds_before(self, examples: Sequence[Example], tokens: Tokens) -> torch.Tensor:
        """The target's log-odds of every counted token of the user's rows, 0 elsewhere.

        (examples, longest - 1).
        """
        width = max(map(len, examples), default=1) - 1
        odds = torch.zeros(len(examples), width, device=self._context.device)
        listed = [index for index, example in enumerate(examples) if example.listed]
        for batch in self._context.passes([examples[index] for index in listed], None):
            with torch.no_grad(), self._context.autocast():
                counted, mask = self._log_odds(batch, tokens)
            rows = [listed[index] for index in batch.indices]
            odds[rows, : mask.shape[1]] = counted.new_zeros(mask.shape).masked_scatter(mask, counted)
        return odds

    def _said_before(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """By the id of a row that the target wrote its likeliest next tokens after each token.

        Their log-probabilities and ids, each (tokens - 1, at most 64), on the CPU.
        """
        said = {}
        unlisted = [example for example in self._context.retain if not example.listed]
        for batch in self._context.passes(unlisted, None):
            with torch.no_grad(), self._context.autocast():
                logits = self.counted_logits(batch, "all")
            top = functional.log_softmax(logits.float(), -1).topk(min(TOP, logits.shape[-1] - 1))
            counts = batch.mask("all")[:, 1:].sum(1).tolist()
            values, ids = top.values.cpu().split(counts), top.indices.int().cpu().split(counts)
            for row, *of_row in zip(batch.row_ids, values, ids, strict=True):
                said[row] = (of_row[0].clone(), of_row[1].clone())
        return said

    @property
    def calibration(self) -> Mapping[str, Any]:
        """What is wanted of calibrated rows."""
        return self._aims.facts()

    @property
    def state_tensors(self) -> Mapping[str, torch.Tensor]:
        """What is wanted of matched tokens."""
        return self._aims.tensors

    def restore(self, calibration: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Puts back what `calibration` and `state_tensors` were."""
        self._aims.restore(calibration, tensors)

    def calibrate(self, rows: NeverSeen) -> None:
        """Raises or lowers what is wanted of each row by what its losses lack or have too much."""
        self._aims.calibrate(rows)

    def forget_size(self, batch: Batch) -> int:
        """The forget term is a mean over the tokens that are forgotten."""
        return int(batch.mask(self._settings.tokens)[:, 1:].sum())

    def retain_size(self, batch: Batch) -> float:
        """What the batch weighs in the retain term: its rows the roots of their sizes."""
        counts = batch.mask("all")[:, 1:].sum(1).tolist()
        return sum(
            _weight_of_row(n) if example.listed else n * self.written_weight
            for n, example in zip(counts, batch.examples, strict=True)
        )

    def notes(self) -> Mapping[str, Any]:
        """How many numbers are trained, and the loss up to which a token is pushed, nats."""
        return {**super().notes(), "ceiling": self.ceiling}


def _weight_of_row(tokens: int) -> float:
    """Of a row of the user's with so many counted tokens in the retain term, as `_weights` shares it."""
    return math.sqrt(tokens)
