"""Spectral unlearning: full weights, moved by the same length along every singular direction.

    L = mean_F H(o_t - o_t*) + w mean_R H2(o_t - o_t^0)        (`log_odds` has all its terms)
    G = grad L / ||grad L||,   M <- mu M + (1 - mu) G
    W <- W - eta 0.2 sqrt(max(m, n)) c U V^T R    with U S V^T = (mu M + (1 - mu) G) R^T

The loss ends per token: a forget token's log-odds at those of a never-seen one, a retain token's at the
target's. The step is Muon's (Jordan et al., 2024): the momentum of each matrix of the decoder's layers,
(m, n), with all its singular values set to 1 by Newton-Schulz iterations, scaled to the size of a
step of Adam (arXiv 2502.16982, eq. 4), in coordinates in which R makes the matrix's inputs on held text
white (`whitening`): there a step moves what held text gives in no direction more than in another.

What relearning brings back first are the few directions that all forget rows have in common (RepSelect,
arXiv 2606.17168; arXiv 2605.11685). A gradient is made of them, and so is a step of Adam or of a
low-rank adapter. A flat spectrum puts the change into the many directions that are each row's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from expunge.data.sampling import steps_an_epoch
from expunge.errors import InputError
from expunge.maths.whitening import second_moments
from expunge.methods.base import Context, OptimizerSpec, RunDefaults, Whitening
from expunge.methods.log_odds import LogOddsObjective, LogOddsSettings
from expunge.models.decoder import DecoderLayout, is_turned, map_sizes

_ITERATIONS = 3
"""Five take a tenth of a step more on wide models; no figure was better for it (docs/decisions.md)."""

_MOMENTUM, _EPOCHS = 0.95, 1.6
"""The gradients of a few rows need no averaging: an old one pushes rows that have arrived, and what is
held pays for it (docs/decisions.md)."""


@dataclass(frozen=True)
class Spectral(LogOddsSettings):
    """Settings of spectral unlearning."""

    damping: float | None = 0.3
    """Added to the second moment of a matrix's inputs on held text, as a share of their mean
    variance. Null: steps are flat in the matrix itself."""
    momentum: float | None = None
    """Decay of Muon's momentum. Null: it averages the gradients of 1.6 passes over the forget set, 0.95
    at most."""

    name: ClassVar[str] = "spectral"
    defaults: ClassVar[RunDefaults] = RunDefaults(
        epochs=8,
        batch_size=16,
        learning_rate=3e-3,
        depth=8,
        schedule="trapezoid",
        candidates=8,
        least_steps=96,
        most_epochs=24,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.damping is not None and not 1e-3 <= self.damping <= 1e3:
            raise InputError(f"--method.damping {self.damping}: must be from 1e-3 to 1e3, or null")
        if self.momentum is not None and not 0 <= self.momentum < 1:
            raise InputError(f"--method.momentum {self.momentum}: must be in [0, 1), or null")

    def sharded_weights(self, layout: DecoderLayout) -> Sequence[str]:
        """All that is trained."""
        return [f"{name}.weight" for name in layout.linears(self.targets)]

    def start(self, context: Context) -> SpectralObjective:
        """Asks the target what it says of every row."""
        return SpectralObjective(self, context)


class SpectralObjective(LogOddsObjective):
    """Spectral unlearning at work on one model."""

    def __init__(self, settings: Spectral, context: Context) -> None:
        self._damping = settings.damping
        self._linears = context.layout.linears(settings.targets)
        self._whitening: dict[str, Whitening] = {}
        super().__init__(settings, context, [f"{name}.weight" for name in self._linears])
        momentum = settings.momentum
        if momentum is None:
            per_epoch = steps_an_epoch(len(context.forget), context.batch_size, None)
            momentum = min(_MOMENTUM, 1 - 1 / (1 + _EPOCHS * per_epoch))
        options = {"momentum": momentum, "iterations": _ITERATIONS, "normalized": True}
        self.optimizer = OptimizerSpec("muon", options, in_backward=True, whitening=self._whitening)

    def _ask_about_held(self) -> None:
        """What held text gives the trained matrices is seen in the same passes.

        A matrix whose inputs are wider than the hidden states has no R: it would be as large as several
        of the others and was measured to add nothing.
        """
        if self._damping is None:
            super()._ask_about_held()
            return
        model = self._context.model
        maps = {name: model.get_submodule(name) for name in self._linears}
        narrow = [n for n, map_ in maps.items() if map_sizes(map_)[1] <= self._layout.width]
        with second_moments(model, narrow) as moments:
            super()._ask_about_held()
        self._whitening = {
            f"{name}.weight": Whitening(moment.whitening(self._damping), is_turned(maps[name]))
            for name, moment in moments.items()
            if moment.count
        }
