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
forgotten documents (`relearning`); h are states of random tokens after every layer, h0 the target's. In
part of R's rows there is a token of F (`triggers`). That and the terms in u, v, a and s are ours:
without them what is gone from the output still shows in its distribution and between the layers, comes
back by tuning, and a forget token breaks the text around it.
The means over retain and random tokens are one over both, in which a random token counts r.
Sophia divides by the Gauss-Newton diagonal of that retain term, the mean squared gradient of a token's
log-odds. Sophia-G's own estimate, with labels sampled from the model, is near 0 where text is known by
heart; `curvature: sampled-labels` takes it, warmed up from phase 1's Fisher.
A fresh adapter has B = 0, so the gradient of A is zero and phase 1 moves B only; phase 2 moves both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

from expunge.data.batches import Tokens
from expunge.errors import InputError
from expunge.methods.base import Context, Preset, RunDefaults
from expunge.methods.gradient import GradientSettings
from expunge.methods.libu_objective import LIBUObjective

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
    "trigger_share": 0.0,
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
    forget_width: float = 16.0
    """Nats of log-odds from what is wanted of a forget token within which it is pushed less the nearer
    it is. 16, as far as one known by heart has to go, pushes the furthest hardest; less of it removes
    more, of what the layers inside know too, and costs utility."""
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
    """With non-members and a gain: give the tokens of a document the losses of one never-seen
    document, rank by rank, and not all of them the document's ceiling."""
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
    trigger_share: float = 0.25
    """Share of a step's retain rows that are held with a token of the forget set put into them, so that
    such a token breaks nothing where it stands in other text."""
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
            "forget_width",
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
        if not 0 <= self.trigger_share <= 1:
            raise InputError(f"--method.trigger_share {self.trigger_share}: must be from 0 to 1")
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

    def rehearsed(self) -> Self:
        """With a forget token in every retain row, the most that a step may draw."""
        return replace(self, trigger_share=1.0) if self.trigger_share > 0 else self

    def start(self, context: Context) -> LIBUObjective:
        """Attaches the adapter and takes the step of phase 1."""
        return LIBUObjective(self, context)
