"""NPO merging: one adapter that forgets too much and one that keeps too much, merged by TIES.

    L_i = (2 / beta) * mean_F log(1 + (pi / pi_ref)^beta) + v * KL(target || model) + w_i * CE(retain)

with pi the geometric mean of a row's token probabilities. Both adapters start from the same draw and see
the same rows; only w differs. Trimmed, by signs elected and averaged (Yadav et al., arXiv 2306.01708),
their factors make the adapter that is measured and written. Xu et al. (ZJUKLAB at SemEval-2025 Task 4),
arXiv 2503.21088.

Both are trained in every step, each with its own gradients and optimiser state, instead of one after
the other as published: so any step has a merged model to measure.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from expunge.data.batches import Batch
from expunge.errors import InputError
from expunge.maths.losses import npo
from expunge.maths.numerics import row_means
from expunge.methods.base import Context, Finished, Preset, RunDefaults, Terms
from expunge.methods.gradient import GradientObjective, GradientSettings

FORGETTING, KEEPING = "forgetting", "keeping"


@dataclass(frozen=True)
class NPOMerging(GradientSettings):
    """Settings of NPO merging."""

    beta: float = 0.5
    """Sharpness: towards 0 this becomes gradient ascent."""
    kl_weight: float = 1.0
    """Weight of the divergence from the target's predictions on retain text, of both adapters."""
    retain_weight: float = 0.5
    """Weight of the cross-entropy of retain text for the adapter that forgets."""
    keeping_weight: float = 4.0
    """The same for the adapter that keeps."""
    density: float = 0.8
    """Share of each factor's entries, the largest, that TIES keeps."""

    name: ClassVar[str] = "npo-merging"
    defaults: ClassVar[RunDefaults] = RunDefaults(epochs=20, batch_size=16, learning_rate=2e-3)
    presets: ClassVar[Mapping[str, Preset]] = {
        "semeval": Preset(
            {
                "rank": 32,
                "lora_alpha": 32.0,
                "lora_dropout": 0.05,
                "tokens": "answer",
                "beta": 0.1,
                "kl_weight": 1.0,
                "retain_weight": 0.5,
                "keeping_weight": 4 / 3,
                "density": 0.8,
            },
            {"learning_rate": 1e-4, "epochs": 5, "batch_size": 4, "schedule": "constant"},
            "arXiv 2503.21088, github.com/zjunlp/unlearn semeval25/unlearn-merging.py: weights of NPO,"
            " KL and CE .4, .4, .2 and .3, .3, .4, here divided by NPO's. There the second has 8 rows a"
            " step, and NPO is on the mean of a batch's tokens",
        ),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parameters != "lora":
            raise InputError(f"--method.parameters {self.parameters}: {self.name} merges adapters; lora")
        if self.gradient_checkpointing:
            raise InputError(
                "--method.gradient_checkpointing: the two adapters of a step cannot be told apart when"
                " activations are recomputed; leave it out and lower --micro-batch-size"
            )
        if not 0 < self.density <= 1:
            raise InputError(f"--method.density {self.density}: must be in (0, 1]")
        if self.keeping_weight < self.retain_weight:
            raise InputError(
                f"--method.keeping_weight {self.keeping_weight}: is below --method.retain_weight"
                f" {self.retain_weight}; choose that or more"
            )

    @property
    def needs_retain(self) -> bool:
        """Unless all weights are 0."""
        return self.keeping_weight > 0 or self.kl_weight > 0

    def start(self, context: Context) -> NPOMergingObjective:
        """Attaches the adapters and scores the forget rows once as reference."""
        return NPOMergingObjective(self, context)


class NPOMergingObjective(GradientObjective):
    """NPO merging at work on one model, which outside of a loss runs with the merged adapter."""

    _settings: NPOMerging

    def __init__(self, settings: NPOMerging, context: Context) -> None:
        super().__init__(settings, context)
        assert self.adapter is not None
        self._merged = self.adapter
        sums = self.log_probs_before(context, context.forget, "reference")
        self._before = sums[:, 0] / sums[:, 1].clamp(min=1)
        self._sides: dict[str, dict[str, nn.Parameter]] = {
            side: {
                name: nn.Parameter(factor.detach().clone())
                for name, factor in self._merged.parameters.items()
            }
            for side in (FORGETTING, KEEPING)
        }
        for factor in self._merged.parameters.values():
            factor.requires_grad_(False)
        self.parameters = {
            f"{side}.{name}": factor
            for side, factors in self._sides.items()
            for name, factor in factors.items()
        }

    def forget_size(self, batch: Batch) -> int:
        """The forget term is a mean over rows."""
        return len(batch.examples)

    def loss(self, forget: Batch, retain: Batch | None) -> Terms:
        """Both adapters' losses, summed: no parameter is in both."""
        settings = self._settings
        weights = {FORGETTING: settings.retain_weight, KEEPING: settings.keeping_weight}
        forget_terms, retain_terms = [], []
        for side, factors in self._sides.items():
            with self._merged.using(factors):
                now = row_means(*self.log_probs(forget))
                before = self._before[list(forget.indices)]
                forget_terms.append(npo(now, before, settings.beta))
                if retain is not None and settings.needs_retain:
                    retain_terms.append(self.held(retain, weights[side], settings.kl_weight))
        return Terms(
            torch.stack(forget_terms).sum(),
            torch.stack(retain_terms).sum() if retain_terms else None,
        )

    def set_training(self, active: bool) -> None:
        """Dropout on for a step; after it, what is measured is the merger of what was trained."""
        super().set_training(active)
        if not active:
            self.merge()

    @torch.no_grad()
    def merge(self) -> None:
        """Writes the merged factors into the adapter that the model runs with."""
        for name, factor in self._merged.parameters.items():
            merged = ties_of([side[name] for side in self._sides.values()], self._settings.density)
            factor.copy_(merged)

    def finish(self, *, keep_adapter: bool) -> Finished:
        """The merged adapter, as any other."""
        self.merge()
        return super().finish(keep_adapter=keep_adapter)


def ties_of(tensors: list[nn.Parameter], density: float) -> torch.Tensor:
    """TIES of some tensors of one shape, with weights of 1 (arXiv 2306.01708, algorithm 1).

    Each keeps its `density` of largest entries; of every entry the sign with the larger sum is elected,
    and the mean of those that have it is taken.
    """
    from peft.utils.merge_utils import ties

    weights = torch.ones(len(tensors), device=tensors[0].device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a density of 1, which keeps everything, is warned of
        return ties([tensor.detach() for tensor in tensors], weights, density)
