"""LIBU: LoRA-enhanced influence-based unlearning, in two phases (arXiv 2506.04044).

Phase 1, one step of an influence function along the adapter:

    theta <- theta + s * w * g_forget,   w = 1 / (F + lambda)

with g_forget the gradient of the forget loss and F the diagonal Fisher of the retain set. The sign
removes: theta + H^-1 g_forget is the direction of the weights trained without those rows (Koh and
Liang, arXiv 1703.04730). As printed and published the step descends on the forget loss, which
strengthens the memory; `direction: as-published` repeats that for replication. The step size s is
the largest whose predicted rise of the retain loss, s^2/2 * sum(F d^2), stays in `step_budget`; it
is halved until the measured rise does too.

Phase 2, Sophia (arXiv 2305.14342) on

    L = mean_F |logit p_t - logit exp(-c_t)| + w * mean_R |logit p_t - logit p_t_target|

with p_t the probability of a token and c_t the loss that it should have once it is forgotten: a forget
term that ends per token, and the retain term that the published code lacks. Both on the log-odds, as
the gradient of the NLL is 1 - p, nearly 0 for what is known by heart: by the time that a cross-entropy
resists, retain text known by heart is lost. |x| is Huber's.
Sophia divides by the Gauss-Newton diagonal of that retain term, the mean squared gradient of a token's
log-odds. Sophia-G's own estimate, with labels sampled from the model, is near 0 where text is known by
heart; `curvature: sampled-labels` takes it, warmed up from phase 1's Fisher.
A fresh adapter has B = 0, so the gradient of A is zero and phase 1 moves B only; phase 2 moves both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from expunge.data.batches import Batch, Tokens, in_order
from expunge.data.tokenization import Example
from expunge.errors import InputError, RunError
from expunge.methods.base import Context, OptimizerSpec, Preset, RunDefaults, Terms
from expunge.methods.calibration import NeverSeen
from expunge.methods.fisher import SquaredGradients
from expunge.methods.gradient import GradientObjective, GradientSettings
from expunge.methods.influence import predicted_rise, removal_step, size_within
from expunge.methods.losses import log_odds_at, odds_distance, token_kl
from expunge.methods.numerics import row_means, target_log_odds, target_log_probs

_HALVINGS = 12
_PROBE_ROWS = 64
_CEILING = 0.8
_RANGE = (0.5, 1.25)
_FORGET_WIDTH = 16.0
"""Nats of log-odds, as far as a token known by heart has to go: the furthest off are pushed hardest."""
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
    "random_rows": 0,
    "calibration_gain": 0.0,
}


@dataclass(frozen=True)
class LIBU(GradientSettings):
    """Settings of LIBU."""

    forget_tokens: Tokens = "all"
    """Which tokens phase 2 forgets: all, or of questions the answer only."""
    direction: Literal["remove", "as-published"] = "remove"
    """Remove the influence of forget rows, or descend on their loss as the published code does."""
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
    random_rows: int = 128
    """Rows of random tokens on which the target's predictions are held, beside the retain set. They
    stand for all text that no set lists: without them utility moves by chance."""
    calibration_gain: float = 1.0
    """With non-members: how far a row's ceiling moves for each nat that its loss is wrong by; 0 leaves
    all of them where they are."""
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
        for option in ("damping", "step_budget", "gamma", "rho", "curvature_interval"):
            if getattr(self, option) <= 0:
                raise InputError(f"--method.{option} {getattr(self, option)}: must be positive")
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
        self._ceilings: dict[str, float] = {}
        # Sharded weights are gathered in every pass, so all processes must make as many passes,
        # whichever kinds of rows their shares hold.
        self._equal_passes = context.processes.shards and settings.random_rows > 0
        if settings.direction == "remove":
            self._forget_before = self._odds_before(context.forget, settings.forget_tokens)
            self._retain_before = self._odds_before(context.retain, settings.tokens)
        self._probe = [e for e in context.retain if e.listed][:_PROBE_ROWS]
        self.fisher: Mapping[str, torch.Tensor] = {}
        if context.resumed is not None:  # the adapter and the curvature are put back
            self._notes = context.resumed["phase_1"]
            return
        self.fisher = self.diagonal_fisher([e for e in context.retain if e.listed])
        self._notes = self._phase_one(self.forget_gradient(context.forget), self.fisher)

    def diagonal_fisher(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Mean over examples of T * (gradient of the mean loss of its T tokens)^2, by parameter.

        With tokens' gradients uncorrelated this is the mean squared gradient per token, so that
        d^T F d / 2 predicts the rise of the mean token loss.
        """
        assert self.adapter is not None
        squares = SquaredGradients(self.adapter.factors())
        for batch in self._passes(examples, "Fisher"):
            with squares.collecting(len(batch.row_ids)), self._context.autocast():
                log_probs, mask = self.log_probs(batch)
                loss = -(row_means(log_probs, mask) * mask.sum(1).float().sqrt()).sum()
                loss.backward()
        self._clear_gradients()
        return squares.mean()

    def forget_gradient(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Gradient of the mean token loss over all examples, by parameter."""
        tokens = 0
        for batch in self._passes(examples, "forget gradient"):
            with self._context.autocast():
                log_probs, mask = self.log_probs(batch)
                torch.where(mask, -log_probs, 0.0).sum().backward()
            tokens += int(mask.sum())
        gradient = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.div_(max(1, tokens))
            for name, p in self.parameters.items()
        }
        self._clear_gradients()
        return gradient

    def loss(self, forget: Batch, retain: Batch | None) -> Terms:
        """Phase 2's loss; as published, the forget loss itself."""
        settings = self._settings
        if settings.direction == "as-published":
            return self.with_retain(self.cross_entropy(forget), retain, settings.retain_weight)
        mask = forget.mask(settings.forget_tokens)[:, 1:]
        log_odds = target_log_odds(
            self.counted_logits(forget, settings.forget_tokens), forget.input_ids[:, 1:][mask]
        )
        distances = odds_distance(log_odds, self._wanted_odds(forget)[mask], _FORGET_WIDTH)
        term = distances.sum() / max(1, len(distances))
        if retain is None or settings.retain_weight == 0:
            return Terms(term, None)
        return Terms(term, settings.retain_weight * self._drift(retain))

    def _drift(self, retain: Batch) -> torch.Tensor:
        """How far retain text is from what the target says of it, mean over counted tokens.

        The user's tokens by their log-odds, random ones by KL(target || model), as a random token itself
        has no log-odds worth holding.
        """
        mask = retain.mask(self._settings.tokens)[:, 1:]
        listed = torch.tensor([example.listed for example in retain.examples], device=mask.device)
        logits = self.counted_logits(retain)
        of_user = listed[:, None].expand_as(mask)[mask]
        targets = retain.input_ids[:, 1:][mask]
        log_odds = target_log_odds(logits[of_user], targets[of_user])
        before = self._retain_before[list(retain.indices), : mask.shape[1]][mask][of_user]
        total = odds_distance(log_odds, before, _RETAIN_WIDTH).sum()
        _, random = retain.split_listed()
        if random is not None or self._equal_passes:
            with self.reference():
                reference = self.counted_logits(random or retain.rows(0, 1))
            if random is not None:
                total = total + token_kl(logits[~of_user], reference).sum()
        return total / max(1, len(logits))

    @property
    def strengths(self) -> Mapping[str, float]:
        """Calibrated rows' ceilings, nats a token."""
        return self._ceilings

    def restore_strengths(self, strengths: Mapping[str, float]) -> None:
        """Puts back what `strengths` was."""
        self._ceilings = dict(strengths)

    def calibrate(self, rows: NeverSeen) -> None:
        """Raises or lowers each row's ceiling by what its loss lacks or has too much."""
        gain = self._settings.calibration_gain
        if gain == 0:
            return
        for row, loss in rows.losses.items():
            wanted = rows.wanted[row]
            start = self._ceilings.get(row)
            moved = wanted if start is None else start + gain * (wanted - loss)
            # A ceiling far off would go on pushing long after the loss has arrived.
            self._ceilings[row] = min(max(moved, wanted * _RANGE[0]), wanted * _RANGE[1])

    def _wanted_odds(self, batch: Batch) -> torch.Tensor:
        """The log-odds that each token should have, (rows, tokens - 1).

        Those of its row's ceiling, or what they were in the target where that was less: no token of a
        forget row is made more likely than the target had it.
        """
        before = self._forget_before[list(batch.indices), : batch.input_ids.shape[1] - 1]
        ceilings = [self._ceilings.get(row, self.ceiling) for row in batch.row_ids]
        wanted = log_odds_at(torch.tensor(ceilings, device=before.device))
        return torch.minimum(before, wanted[:, None])

    def _odds_before(self, examples: Sequence[Example], tokens: Tokens) -> torch.Tensor:
        """The target's log-odds of every counted token of the user's rows, 0 elsewhere.

        (examples, longest - 1).
        """
        width = max(map(len, examples), default=1) - 1
        odds = torch.zeros(len(examples), width, device=self._context.device)
        listed = [index for index, example in enumerate(examples) if example.listed]
        for batch in self._passes([examples[index] for index in listed], None):
            mask = batch.mask(tokens)[:, 1:]
            with self.reference(), self._context.autocast():
                counted = target_log_odds(
                    self.counted_logits(batch, tokens), batch.input_ids[:, 1:][mask]
                )
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

    def curvature(self, batch: Batch) -> list[torch.Tensor]:
        """Estimate of the diagonal Hessian of the retain term, or of the retain loss.

        Of the retain term: E[(gradient of the sum of a token's log-odds times a random sign)^2] / tokens
        is the mean over tokens of the squared gradient (Hutchinson's estimate of J^T J). Of the loss:
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
            for batch in self._passes(listed, "curvature"):
                for sum_, part in zip(total, self.curvature(batch), strict=True):
                    sum_ += part * (len(batch.indices) / len(listed))
        return total

    def notes(self) -> Mapping[str, Any]:
        """The measured figures of phase 1."""
        return {**super().notes(), "ceiling": self.ceiling, "phase_1": self._notes}

    def _phase_one(
        self, gradient: Mapping[str, torch.Tensor], fisher: Mapping[str, torch.Tensor]
    ) -> dict[str, float]:
        settings = self._settings
        entries = sum(f.numel() for f in fisher.values())
        mean_fisher = sum(float(f.sum()) for f in fisher.values()) / entries
        damping = settings.damping * (mean_fisher if settings.damping_unit == "mean-fisher" else 1)
        step = {name: removal_step(gradient[name], fisher[name], damping) for name in gradient}
        rise = sum(float(predicted_rise(step[name], fisher[name])) for name in step)
        if not math.isfinite(rise) or rise <= 0:
            raise RunError(
                f"LIBU phase 1: the predicted rise along its step is {rise:.3g}, no step size"
                " follows; set --method.damping higher or use --dtype float32"
            )
        size = settings.step_size
        halvings = 0
        before = self._retain_loss()
        start = {name: p.detach().clone() for name, p in self.parameters.items()}
        sign = 1 if settings.direction == "remove" else -1
        if size is not None:
            self._move(start, step, sign * size)
            after = self._retain_loss()
        else:
            size = size_within(settings.step_budget, rise)
            self._move(start, step, sign * size)
            while (after := self._retain_loss()) - before > settings.step_budget:
                # The quadratic model holds near the start only, so its answer is checked.
                halvings += 1
                size = size / 2 if halvings <= _HALVINGS else 0.0
                self._move(start, step, sign * size)
        return {
            "mean_fisher": mean_fisher,
            "damping": damping,
            "step_size": size,
            "predicted_retain_rise": size**2 * rise,
            "measured_retain_rise": after - before,
            "halvings": halvings,
        }

    def _move(
        self, start: Mapping[str, torch.Tensor], step: Mapping[str, torch.Tensor], size: float
    ) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(start[name] + size * step[name])

    def _retain_loss(self) -> float:
        total = tokens = 0.0
        for batch in self._passes(self._probe, None):
            with torch.no_grad(), self._context.autocast():
                log_probs, mask = self.log_probs(batch)
            total -= float(torch.where(mask, log_probs, 0.0).sum())
            tokens += float(mask.sum())
        return total / max(1.0, tokens)

    def _passes(self, examples: Sequence[Example], phase: str | None) -> Iterator[Batch]:
        context = self._context
        done = 0
        for batch in in_order(examples, context.batch_size, context.pad_id):
            yield batch.to(context.device)
            done += len(batch.indices)
            if phase is not None:
                context.progress(phase, done, len(examples))

    def _clear_gradients(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None
