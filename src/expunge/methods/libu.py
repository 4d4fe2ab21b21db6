"""LIBU: LoRA-enhanced influence-based unlearning, in two phases (arXiv 2506.04044).

Phase 1, one step of an influence function along the adapter:

    theta <- theta + s * w * g_forget,   w = 1 / (F + lambda)

with g_forget the gradient of the forget loss and F the diagonal Fisher of the retain set, or the same
in EK-FAC's eigenbasis. The sign
removes: theta + H^-1 g_forget is the direction of the weights trained without those rows (Koh and
Liang, arXiv 1703.04730). As printed and published the step descends on the forget loss, which
strengthens the memory; `direction: as-published` repeats that for replication. The step size s is
the largest whose predicted rise of the retain loss, s^2/2 * sum(F d^2), stays in `step_budget`; it
is halved until the measured rise does too.

Phase 2, Sophia (arXiv 2305.14342) on

    L = mean_F [ |logit p_t - logit exp(-c_t)| + u |z_t - s_t| + v |logit p_t^l - logit exp(-c_t)|+
                 + a |logit p_t^A - logit exp(-c_t)|+ ]
        + w * (mean_R |logit p_t - logit p_t_target| + mean_random [ KL + s |h - h0|^2 / |h0|^2 ])

with p_t the probability of a token and c_t the loss that it should have once it is forgotten: a forget
term that ends per token, and the retain term that the published code lacks. Both on the log-odds, as
the gradient of the NLL is 1 - p, nearly 0 for what is known by heart: by the time that a cross-entropy
resists, retain text known by heart is lost. |x| is Huber's, |x|+ that of max(0, x). z_t is how much less
likely the token is than its distribution expects, s_t the same in never-seen text; p_t^l is what the
logit lens reads after a layer l, p_t^A what the model gives once an attacker has tuned it on other
forgotten documents (`relearning`); h are states of random tokens after every layer, h0 the target's. The
terms in u, v, a and s are ours: without them what is gone from the output still shows in its
distribution and between the layers, and comes back by tuning.
The means over retain and random tokens are one over both, in which a random token counts r.
Sophia divides by the Gauss-Newton diagonal of that retain term, the mean squared gradient of a token's
log-odds. Sophia-G's own estimate, with labels sampled from the model, is near 0 where text is known by
heart; `curvature: sampled-labels` takes it, warmed up from phase 1's Fisher.
A fresh adapter has B = 0, so the gradient of A is zero and phase 1 moves B only; phase 2 moves both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch.nn import functional

from expunge.data.batches import Batch, Tokens
from expunge.data.rows import document_of
from expunge.data.tokenization import Example
from expunge.errors import InputError
from expunge.methods.aims import Aims
from expunge.methods.base import Context, OptimizerSpec, Preset, RunDefaults, Terms
from expunge.methods.calibration import NeverSeen
from expunge.methods.curvature import Curvature, DiagonalCurvature
from expunge.methods.forward import check_lens
from expunge.methods.gradient import GradientObjective, GradientSettings
from expunge.methods.influence_step import InfluenceStep
from expunge.methods.losses import huber, log_odds_at, relative_change, token_kl
from expunge.methods.numerics import (
    target_log_odds,
    target_log_probs,
    target_surprise,
)
from expunge.methods.relearning import Relearner

_CEILING = 0.8
_FORGET_WIDTH = 16.0
"""Nats of log-odds, as far as a token known by heart has to go: the furthest off are pushed hardest."""
_SURPRISE_WIDTH = 1.0
"""A factor of e in how many deviations a token lies from what is expected."""
_RETAIN_WIDTH = 2.0
"""Nats of log-odds, a factor of 7 in the odds: what is lost is pulled back with all weight soon."""
_PUBLISHED = {
    "rank": 16,
    "lora_alpha": 32.0,
    "lora_dropout": 0.05,
    "targets": "attention",
    "damping": 1e-3,
    "damping_unit": "absolute",
    "curvature": "sampled-labels",
    "rho": 0.04,
    "gamma": 1.0,
    "beta2": 0.999,
    "forget_tokens": "all",
    "retain_weight": 2.0,
    "random_rows": 0,
    "random_weight": 1.0,
    "calibration_gain": 0.0,
    "match_tokens": False,
    "surprise_weight": 0.0,
    "lens_weight": 0.0,
    "relearn_weight": 0.0,
    "states_weight": 0.0,
}


@dataclass(frozen=True)
class LIBU(GradientSettings):
    """Settings of LIBU."""

    forget_tokens: Tokens = "all"
    """Which tokens phase 2 forgets: all, or of questions the answer only."""
    direction: Literal["remove", "as-published"] = "remove"
    """Remove the influence of forget rows, or descend on their loss as the published code does."""
    preconditioner: Literal["diagonal", "ekfac"] = "diagonal"
    """F in phase 1: the Fisher's diagonal, or EK-FAC, a diagonal in the eigenbasis of each factor of the
    adapter, at two more passes over the retain set and inputs^2 + outputs^2 numbers a factor."""
    damping: float = 1.0
    """lambda, what is added to the Fisher before it is inverted."""
    damping_unit: Literal["mean-fisher", "absolute"] = "mean-fisher"
    """Unit of the damping: the mean of the Fisher's entries, or 1."""
    step_budget: float = 0.02
    """Phase 1 may raise the retain loss by this many nats a token."""
    step_size: float | None = None
    """Phase 1 step size s; null: the largest within the step budget."""
    ceiling: float | None = None
    """Phase 2 raises each forget token's loss to this many nats; null: 0.8 log(vocabulary)."""
    retain_weight: float = 2.0
    """Weight of the retain term."""
    random_rows: int = 256
    """Rows of random tokens on which the target's predictions are held, beside the retain set. They
    stand for all text that no set lists: without them utility moves by chance."""
    random_weight: float = 0.4
    """Weight of a random token in the retain term, where one of the user's has 1."""
    calibration_gain: float = 1.0
    """With non-members: how far a row's ceiling moves for each nat that its loss is wrong by; 0 leaves
    all of them where they are."""
    match_tokens: bool = True
    """With non-members and a gain: give the tokens of a document the spread of losses of never-seen
    ones, rank by rank, and not all of them the document's ceiling."""
    surprise_weight: float = 1.0
    """Where tokens are matched: weight of the term that makes a forgotten token as surprising, in
    deviations from what its own distribution expects, as one of the same rank in never-seen text."""
    lens_weight: float = 0.5
    """Weight of the forget term of a layer inside, another one in every step: what the logit lens reads
    there may be no likelier than what is wanted of the output."""
    relearn_weight: float = 0.1
    """Weight of the distance of the log-odds after an attacker's tuning on other forgotten subjects, for
    those that it was not shown: forgetting is to outlast it. 0 leaves the attacker out, and so does a
    forget set of one document."""
    relearn_steps: int = 16
    """Steps of an attack, one beside each step of the training, at the run's learning rate; then it
    starts anew."""
    states_weight: float = 3.0
    """Weight, on random rows, of how far the states after each layer moved, squared, in units of their
    length: what pushes inside is held inside."""
    curvature: Literal["log-odds", "sampled-labels"] = "log-odds"
    """What Sophia divides by: the mean squared gradient of retain tokens' log-odds, or the published
    estimate, that of the loss on labels sampled from the model."""
    gamma: float = 1.0
    """Sophia divides the momentum by gamma times the curvature."""
    rho: float = 1.0
    """Sophia clips each element of its step here; times the learning rate it bounds the step."""
    beta1: float = 0.9
    """Decay of Sophia's momentum."""
    beta2: float = 0.99
    """Decay of Sophia's curvature estimate."""
    weight_decay: float = 0.0
    """Decoupled weight decay of phase 2."""
    curvature_interval: int = 10
    """Steps between two estimates of the curvature."""

    name: ClassVar[str] = "libu"
    defaults: ClassVar[RunDefaults] = RunDefaults(
        epochs=24, batch_size=16, learning_rate=2e-3, schedule="cosine"
    )
    presets: ClassVar[Mapping[str, Preset]] = {
        "setup-2": Preset(
            _PUBLISHED,
            {"learning_rate": 3e-5, "epochs": 5, "batch_size": 16, "schedule": "constant"},
            "arXiv 2506.04044 setup 2, lr between those of setups 1 and 3; remove direction",
        ),
        "setup-3": Preset(
            _PUBLISHED,
            {"learning_rate": 2e-5, "epochs": 5, "batch_size": 16, "schedule": "constant"},
            "arXiv 2506.04044 setup 3, the paper's best; remove direction",
        ),
        "as-published": Preset(
            {
                **_PUBLISHED,
                "direction": "as-published",
                "step_size": 2e-5,
                "retain_weight": 0.0,
            },
            {"learning_rate": 2e-5, "epochs": 5, "batch_size": 16, "schedule": "constant"},
            "arXiv 2506.04044 setup 3 with the sign and the missing retain term of the published"
            " code: for replication, it does not unlearn",
        ),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parameters != "lora":
            raise InputError(
                f"--method.parameters {self.parameters}: LIBU works on an adapter; lora"
            )
        for option in (
            "damping",
            "step_budget",
            "gamma",
            "rho",
            "curvature_interval",
            "relearn_steps",
        ):
            if getattr(self, option) <= 0:
                raise InputError(f"--method.{option} {getattr(self, option)}: must be positive")
        for option in (
            "random_weight",
            "calibration_gain",
            "surprise_weight",
            "lens_weight",
            "relearn_weight",
            "states_weight",
            "weight_decay",
        ):
            if getattr(self, option) < 0:
                raise InputError(f"--method.{option} {getattr(self, option)}: must be 0 or more")
        for option in ("step_size", "ceiling"):
            value = getattr(self, option)
            if value is not None and value <= 0:
                raise InputError(f"--method.{option} {value}: must be positive, or null")
        for option in ("beta1", "beta2"):
            if not 0 <= getattr(self, option) < 1:
                raise InputError(f"--method.{option} {getattr(self, option)}: must be in [0, 1)")

    @property
    def needs_retain(self) -> bool:
        """Always: the Fisher is the retain set's."""
        return True

    @property
    def matches_tokens(self) -> Tokens | None:
        """Those that are forgotten, where they have aims of their own and these are calibrated."""
        calibrated = self.calibration_gain > 0 and self.direction == "remove"
        return self.forget_tokens if self.match_tokens and calibrated else None

    def start(self, context: Context) -> LIBUObjective:
        """Attaches the adapter and takes the step of phase 1."""
        return LIBUObjective(self, context)


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
        self._aims = Aims(
            self.ceiling,
            settings.calibration_gain,
            match_tokens=settings.matches_tokens is not None,
        )
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
        distances = huber(log_odds, wanted, _FORGET_WIDTH)
        if surprises:
            away = huber(surprise, wanted_surprise.nan_to_num(), _SURPRISE_WIDTH)
            distances = distances + settings.surprise_weight * torch.where(
                wanted_surprise.isnan(), 0.0, away
            )
        if inner is not None:
            above = torch.maximum(target_log_odds(inner, targets), wanted)
            distances = distances + settings.lens_weight * huber(above, wanted, _FORGET_WIDTH)
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
        tokens = self._settings.forget_tokens
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
                above = huber(torch.maximum(log_odds, wanted), wanted, _FORGET_WIDTH).sum()
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

        The user's tokens by their log-odds, random ones by KL(target || model), as a random token itself
        has no log-odds worth holding, and by their states after every layer.
        """
        settings = self._settings
        mask = retain.mask(settings.tokens)[:, 1:]
        listed = torch.tensor([example.listed for example in retain.examples], device=mask.device)
        _, random = retain.split_listed()
        hold = settings.states_weight > 0 and random is not None
        logits, states = self.logits_and_states(retain, ~listed if hold else None)
        of_user = listed[:, None].expand_as(mask)[mask]
        targets = retain.input_ids[:, 1:][mask]
        log_odds = target_log_odds(logits[of_user], targets[of_user])
        before = self._retain_before[list(retain.indices), : mask.shape[1]][mask][of_user]
        total = huber(log_odds, before, _RETAIN_WIDTH).sum()
        if some := random or (self._idle_row(retain) if settings.random_rows else None):
            every = torch.ones(len(some.indices), dtype=torch.bool, device=mask.device)
            with self.reference():
                reference, states_before = self.logits_and_states(some, every if hold else None)
            if not some.is_idle:
                total = total + settings.random_weight * token_kl(logits[~of_user], reference).sum()
            if hold:
                moved = torch.stack(list(map(relative_change, states, states_before))).mean(0)
                total = total + settings.random_weight * settings.states_weight * moved.sum()
        return total / (self.retain_size(retain) or 1.0)

    @property
    def calibration(self) -> Mapping[str, Any]:
        """What is wanted of calibrated rows, and how far an attacker is."""
        attack = {} if self._relearner is None else {"relearner": self._relearner.facts()}
        return self._aims.state() | attack

    def restore_calibration(self, calibration: Mapping[str, Any]) -> None:
        """Puts back what `calibration` was."""
        self._aims.restore(calibration)
        if self._relearner is not None:
            self._relearner.restore(calibration["relearner"])

    @property
    def state_tensors(self) -> Mapping[str, torch.Tensor]:
        """What an attacker has learned."""
        return {} if self._relearner is None else self._relearner.tensors

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
        batch alike, random ones included: what moves them is to be moved with care as well. Of the loss:
        Gauss-Newton-Bartlett, tokens * (gradient on labels sampled from the model)^2.
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
        """The measured figures of phase 1."""
        return {**super().notes(), "ceiling": self.ceiling, "phase_1": self._notes}
