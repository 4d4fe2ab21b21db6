"""LIBU's two phases at work; `libu` has the formulas, where they come from, and the settings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from expunge.data.batches import Batch, Tokens
from expunge.data.rows import document_of
from expunge.data.tokenization import Example
from expunge.methods.aims import Aims
from expunge.methods.base import Context, OptimizerSpec, Terms
from expunge.methods.calibration import NeverSeen
from expunge.methods.curvature import Curvature, DiagonalCurvature
from expunge.methods.forward import check_lens
from expunge.methods.gradient import GradientObjective
from expunge.methods.influence_step import InfluenceStep
from expunge.methods.losses import huber, log_odds_at, relative_change, token_kl
from expunge.methods.numerics import target_log_odds, target_log_probs, target_surprise
from expunge.methods.relearning import Relearner
from expunge.methods.triggers import Triggers

if TYPE_CHECKING:
    from expunge.methods.libu import LIBU

_CEILING = 0.8
_SURPRISE_WIDTH = 1.0
"""A factor of e in how many deviations a token lies from what is expected."""
_RETAIN_WIDTH = 2.0
"""Nats of log-odds, a factor of 7 in the odds: what is lost is pulled back with all weight soon."""


@dataclass(frozen=True)
class _Said:
    """The target on the rows of a step that change."""

    log_odds: torch.Tensor
    """Of the user's rows with a forget token in them; (counted tokens,)."""
    logits: torch.Tensor
    """Of random rows; (counted tokens, vocabulary)."""
    states: Sequence[torch.Tensor]
    """Of random rows after every layer, where they are held; (counted tokens, width) each."""


class LIBUObjective(GradientObjective):
    """LIBU at work on one model; phase 1 is done when this is constructed."""

    def __init__(self, settings: LIBU, context: Context) -> None:
        super().__init__(settings, context)
        self._settings = settings
        self._context = context
        self.optimizer = OptimizerSpec(
            "sophia",
            {
                "gamma": settings.gamma,
                "rho": settings.rho,
                "betas": (settings.beta1, settings.beta2),
                "weight_decay": settings.weight_decay,
            },
            settings.curvature_interval,
        )
        vocabulary = context.model.config.vocab_size
        # Text that was never seen is still better predicted than by guessing, log(vocabulary).
        guessing = math.log(vocabulary)
        self.ceiling = _CEILING * guessing if settings.ceiling is None else settings.ceiling
        self._aims = Aims(self.ceiling, settings.calibration_gain)
        if settings.lens_weight > 0 and settings.direction == "remove":
            with context.autocast():
                check_lens(context.model, context.layout)
        if settings.direction == "remove":
            self._forget_before = self._odds_before(context.forget, settings.forget_tokens)
            self._retain_before = self._odds_before(context.retain, settings.tokens)
        self.fisher: Mapping[str, torch.Tensor] = {}
        if context.resumed is None:
            self._notes = self._phase_1()
        else:  # the adapter and the curvature are put back
            self._notes = context.resumed["phase_1"]
        self._relearner = self._attacker()
        share = settings.trigger_share if settings.direction == "remove" else 0.0
        self._triggers = Triggers(context.forget, context.retain, share, context.pad_id)

    def _phase_1(self) -> Mapping[str, Any]:
        """Takes the step along the adapter; its measured figures."""
        settings, context = self._settings, self._context
        step = InfluenceStep(self, context)
        retained = [example for example in context.retain if example.listed]
        self.fisher = step.diagonal_fisher(retained)
        gradient = step.forget_gradient(context.forget)
        assert self.adapter is not None
        moved = {name: gradient[name] for name in self.adapter.moves_first}
        curvature: Curvature = DiagonalCurvature(self.fisher)
        if settings.preconditioner == "ekfac":
            curvature = step.ekfac(retained, moved)
        return step.take(settings, moved, self.fisher, curvature)

    def _attacker(self) -> Relearner | None:
        """None where it is left out, or has but one document, and so nobody to learn from."""
        settings, context = self._settings, self._context
        documents = {document_of(example.row_id) for example in context.forget}
        if settings.relearn_weight == 0 or settings.direction != "remove" or len(documents) == 1:
            return None
        return Relearner(
            self.parameters,
            documents,
            context.learning_rate,
            settings.relearn_steps,
            context.generator,
            context.processes,
        )

    def loss(self, forget: Batch, retain: Batch | None) -> Terms:
        """Phase 2's loss; as published, the forget loss itself."""
        settings = self._settings
        if settings.direction == "as-published":
            return self.with_retain(self.cross_entropy(forget), retain, settings.retain_weight)
        attacked = 0.0 if self._relearner is None else self._relearned(forget, self._relearner)
        distances = self._distances(forget)
        term = distances.sum() / max(1, len(distances)) + settings.relearn_weight * attacked
        if retain is None or settings.retain_weight == 0:
            return Terms(term, None)
        return Terms(term, settings.retain_weight * self._drift(retain))

    def _distances(self, forget: Batch) -> torch.Tensor:
        """How far each forget token is from what is wanted of it: by its log-odds, by its surprise, and
        by the logit lens inside; (counted tokens,)."""
        settings = self._settings
        mask = forget.mask(settings.forget_tokens)[:, 1:]
        targets = forget.input_ids[:, 1:][mask]
        inner = None
        if settings.lens_weight > 0 and self._layout.count > 1:
            logits, inner = self.lens_logits(forget, self._inner_layer(), settings.forget_tokens)
        else:
            logits = self.counted_logits(forget, settings.forget_tokens)
        log_odds = target_log_odds(logits, targets)
        surprises = settings.surprise_weight > 0 and settings.matches_tokens is not None
        surprise = target_surprise(logits, targets) if surprises else torch.zeros_like(log_odds)
        wanted, wanted_surprise = self._wanted(forget, mask, log_odds, surprise)
        distances = huber(log_odds, wanted, settings.forget_width)
        if surprises:
            away = huber(surprise, wanted_surprise.nan_to_num(), _SURPRISE_WIDTH)
            distances = distances + settings.surprise_weight * torch.where(
                wanted_surprise.isnan(), 0.0, away
            )
        if inner is not None:
            above = torch.maximum(target_log_odds(inner, targets), wanted)
            distances = distances + settings.lens_weight * huber(
                above, wanted, settings.forget_width
            )
        return distances

    def _relearned(self, forget: Batch, relearner: Relearner) -> torch.Tensor:
        """How far tokens that the attacker was not shown are from what is wanted, at its weights.

        Mean over all counted tokens, those that it was shown at 0; a scalar whose gradient in the
        parameters is that at the attacked weights (first order). One way: what is less likely than
        wanted is left alone.
        """
        assert self.adapter is not None
        attacked = torch.zeros((), device=self._context.device)
        if forget.is_idle and not self._context.processes.shards:
            return attacked
        settings = self._settings
        tokens = settings.forget_tokens
        factors = relearner.factors()
        trained = list(factors.values())
        shown, kept_out = forget.split(relearner.is_shown(forget.row_ids))
        with self.adapter.using(factors):
            if rows := shown or self._idle_row(forget):
                log_odds, _ = self._log_odds(rows, tokens)
                gradients = torch.autograd.grad(functional.softplus(-log_odds).sum(), trained)
                if not rows.is_idle:
                    relearner.collect(gradients, len(log_odds))
                del gradients
            if rows := kept_out or self._idle_row(forget):
                log_odds, mask = self._log_odds(rows, tokens)
                wanted, _ = self._wanted(rows, mask, log_odds, torch.zeros_like(log_odds))
                above = huber(torch.maximum(log_odds, wanted), wanted, settings.forget_width).sum()
                above = above / max(1, self.forget_size(forget))
                gradients = torch.autograd.grad(above, trained)
                if not rows.is_idle:
                    moved = zip(self.parameters.values(), gradients, strict=True)
                    attacked = above.detach() + sum(((p - p.detach()) * g).sum() for p, g in moved)
        return attacked

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
        counts = mask.sum(1).tolist()
        wanted = [
            self._aims.of_row(row, *now)
            for row, *now in zip(
                batch.row_ids, losses.split(counts), surprise.detach().split(counts), strict=True
            )
        ]
        odds = log_odds_at(torch.cat([aim.losses for aim in wanted]))
        before = self._forget_before[list(batch.indices), : mask.shape[1]][mask]
        return torch.minimum(before, odds), torch.cat([aim.surprise for aim in wanted])

    def _drift(self, retain: Batch) -> torch.Tensor:
        """How far retain text is from what the target says of it, mean over counted tokens.

        The user's tokens by their log-odds, with and without a token of the forget set among them;
        random ones by KL(target || model), as a random token itself has no log-odds worth holding, and
        by their states after every layer.
        """
        settings = self._settings
        batch, triggered = self._triggers.put_into(retain)
        random = [not example.listed for example in batch.examples]
        hold = settings.states_weight > 0 and any(random)
        # Asked before the pass that is differentiated, whose activations are not there yet.
        said = self._said_by_target(batch, random, triggered, hold=hold)
        held = torch.tensor(random, device=batch.input_ids.device) if hold else None
        logits, states = self.logits_and_states(batch, held)
        mask = batch.mask(settings.tokens)[:, 1:]
        of_random, of_triggered = (_of_rows(rows, mask) for rows in (random, triggered))
        before = self._retain_before[list(batch.indices), : mask.shape[1]][mask]
        total = torch.zeros((), device=mask.device)
        if said is not None:
            before = before.masked_scatter(of_triggered, said.log_odds)
            unlike = token_kl(logits[of_random], said.logits).sum()
            if hold:
                moved = torch.stack(list(map(relative_change, states, said.states))).mean(0)
                unlike = unlike + settings.states_weight * moved.sum()
            total = total + settings.random_weight * unlike
        targets = batch.input_ids[:, 1:][mask]
        log_odds = target_log_odds(logits[~of_random], targets[~of_random])
        total = total + huber(log_odds, before[~of_random], _RETAIN_WIDTH).sum()
        # Of the rows as they are listed: what each part of a step weighs is counted by them.
        return total / (self.retain_size(retain) or 1.0)

    def _said_by_target(
        self, batch: Batch, random: Sequence[bool], triggered: Sequence[bool], *, hold: bool
    ) -> _Said | None:
        """What the target says of rows that it was not asked about at the start; None without such."""
        settings = self._settings
        asked, _ = batch.split([any(either) for either in zip(random, triggered, strict=True)])
        if asked is None and (settings.random_rows or self._triggers.share):
            asked = self._idle_row(batch)
        if asked is None:
            return None
        is_random = [not example.listed for example in asked.examples]
        held = torch.tensor(is_random, device=asked.input_ids.device) if hold else None
        with self.reference():
            logits, states = self.logits_and_states(asked, held)
        if asked.is_idle:
            return None
        mask = asked.mask(settings.tokens)[:, 1:]
        here = _of_rows(is_random, mask)
        targets = asked.input_ids[:, 1:][mask]
        return _Said(target_log_odds(logits[~here], targets[~here]), logits[here], states)

    @property
    def calibration(self) -> Mapping[str, Any]:
        """What is wanted of calibrated rows, and how far an attacker is."""
        attack = {} if self._relearner is None else {"relearner": self._relearner.facts()}
        return self._aims.facts() | attack

    @property
    def state_tensors(self) -> Mapping[str, torch.Tensor]:
        """What is wanted of matched tokens, and what an attacker has learned."""
        attack = {} if self._relearner is None else self._relearner.tensors
        return self._aims.tensors | attack

    def restore(self, calibration: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Puts back what `calibration` and `state_tensors` were."""
        self._aims.restore(calibration, tensors)
        if self._relearner is not None:
            self._relearner.restore(calibration["relearner"], tensors)

    def end_step(self) -> None:
        """The attacker takes its own."""
        if self._relearner is not None:
            self._relearner.end_step()

    def calibrate(self, rows: NeverSeen) -> None:
        """Raises or lowers what is wanted of each row by what its losses lack or have too much."""
        self._aims.calibrate(rows)

    def _odds_before(self, examples: Sequence[Example], tokens: Tokens) -> torch.Tensor:
        """The target's log-odds of every counted token of the user's rows, 0 elsewhere.

        (examples, longest - 1).
        """
        width = max(map(len, examples), default=1) - 1
        odds = torch.zeros(len(examples), width, device=self._context.device)
        listed = [index for index, example in enumerate(examples) if example.listed]
        for batch in self._context.passes([examples[index] for index in listed], None):
            with self.reference(), self._context.autocast():
                counted, mask = self._log_odds(batch, tokens)
            rows = [listed[index] for index in batch.indices]
            odds[rows, : mask.shape[1]] = counted.new_zeros(mask.shape).masked_scatter(
                mask, counted
            )
        return odds

    def forget_size(self, batch: Batch) -> int:
        """The forget term is a mean over the tokens that are forgotten."""
        if self._settings.direction == "as-published":
            return super().forget_size(batch)
        return int(batch.mask(self._settings.forget_tokens)[:, 1:].sum())

    def retain_size(self, batch: Batch) -> float:
        """The retain term is a mean over tokens, of which random ones weigh otherwise."""
        counts = batch.mask(self._settings.tokens)[:, 1:].sum(1).tolist()
        weights = [1.0 if e.listed else self._settings.random_weight for e in batch.examples]
        return sum(n * weight for n, weight in zip(counts, weights, strict=True))

    def curvature(self, batch: Batch) -> list[torch.Tensor]:
        """Estimate of the diagonal Hessian of the retain term, or of the retain loss.

        Of the retain term: E[(gradient of the sum of a token's log-odds times a random sign)^2] / tokens
        is the mean over tokens of the squared gradient (Hutchinson's estimate of J^T J), over all of the
        batch alike, its rows as they are listed and random ones: what moves these is to be moved with
        care as well. Of the loss: Gauss-Newton-Bartlett, tokens * (gradient on labels sampled from the
        model)^2.
        """
        with self._context.autocast():
            logits = self.counted_logits(batch)
            if self._settings.curvature == "log-odds":
                targets = batch.input_ids[:, 1:][batch.mask(self._settings.tokens)[:, 1:]]
                log_odds = target_log_odds(logits, targets)
                # Drawn on the CPU, so that a GPU's run has the signs of a processor's.
                signs = torch.randint(0, 2, log_odds.shape) * 2.0 - 1
                signed = (signs.to(log_odds) * log_odds).sum() / max(1, len(log_odds)) ** 0.5
                gradients = torch.autograd.grad(signed, list(self.parameters.values()))
                return [gradient.float().square() for gradient in gradients]
            with torch.no_grad():
                probabilities = logits.detach().float().softmax(-1).cpu()
                sampled = torch.multinomial(probabilities, 1)[:, 0].to(logits.device)
            loss = -target_log_probs(logits, sampled).sum() / max(1, len(sampled))
        gradients = torch.autograd.grad(loss, list(self.parameters.values()))
        return [len(sampled) * gradient.float().square() for gradient in gradients]

    def initial_curvature(self) -> list[torch.Tensor] | None:
        """Of the whole retain set, so that the first steps are not sign-momentum: one more pass for the
        log-odds, phase 1's Fisher for sampled labels."""
        if not self.fisher:
            return None  # a resumed run puts its own back
        if self._settings.curvature == "sampled-labels":
            return [self.fisher[name] for name in self.parameters]
        listed = [example for example in self._context.retain if example.listed]
        total = [torch.zeros_like(parameter) for parameter in self.parameters.values()]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._context.generator("curvature").initial_seed() % 2**63)
            for batch in self._context.passes(listed, "curvature"):
                for sum_, part in zip(total, self.curvature(batch), strict=True):
                    sum_ += part * (len(batch.indices) / len(listed))
        return total

    def notes(self) -> Mapping[str, Any]:
        """The measured figures of phase 1, and how many forget tokens retain rows are given."""
        trigger = {"trigger_tokens": self._triggers.count} if self._triggers.share else {}
        return {**super().notes(), "ceiling": self.ceiling, "phase_1": self._notes, **trigger}


def _of_rows(rows: Sequence[bool], mask: torch.Tensor) -> torch.Tensor:
    """Which of the tokens in a mask are the marked rows': (counted tokens,)."""
    return torch.tensor(rows, device=mask.device)[:, None].expand_as(mask)[mask]
