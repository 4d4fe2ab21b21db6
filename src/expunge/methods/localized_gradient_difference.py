"""Localized gradient difference: ascent on the layers that carry the answers, and on their MLPs alone.

    L = -CE(forget) + mean_t alpha_row(t) * NLL_t over retain tokens t
    alpha = clip(0.3 * 6^rise + 0.8, least, most)

with `rise` how far a retain row's mean NLL is above the target's, so that rows which suffer are held
harder. Causal tracing finds the layers (causal_tracing.py). Agrawal and Huang (SHA256 at SemEval-2025
Task 4), arXiv 2504.12996. Unbounded: the run is saved by its checkpoint choice or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from expunge.data.batches import Batch
from expunge.errors import InputError
from expunge.maths.losses import adaptive_weights
from expunge.maths.numerics import row_means
from expunge.methods.base import Context, Preset, RunDefaults, Terms
from expunge.methods.causal_tracing import best_window, layer_effects
from expunge.methods.gradient import GradientObjective, GradientSettings
from expunge.models.decoder import DecoderLayout, Targets
from expunge.models.weights import named_within

_TRACED_ROWS = 48


@dataclass(frozen=True)
class LocalizedGradientDifference(GradientSettings):
    """Settings of localized gradient difference."""

    parameters: Literal["lora", "full"] = "full"
    """Train a low-rank adapter, or the weights themselves, of the chosen layers."""
    targets: Targets = "mlp"
    """Which linear maps of the chosen layers are trained."""
    localization: Literal["traced", "first"] = "traced"
    """Choose the neighbouring layers with the largest effect in causal tracing, or the first ones."""
    trained_share: float = 0.5
    """Share of the decoder layers that is trained; published is 6 of 32, too few of a small model."""
    noise: float = 3.0
    """Noise of causal tracing, in standard deviations of the embeddings."""
    retain_weight: float = 2.0
    """Least weight of a retain row."""
    retain_weight_most: float = 7.0
    """Largest weight of a retain row, for one whose loss has risen by 1.7 nats or more."""

    name: ClassVar[str] = "localized-gradient-difference"
    defaults: ClassVar[RunDefaults] = RunDefaults(epochs=8, batch_size=16, learning_rate=3e-4)
    presets: ClassVar[Mapping[str, Preset]] = {
        "semeval": Preset(
            {
                "parameters": "full",
                "targets": "mlp",
                "localization": "first",
                "trained_share": 0.1875,
                "tokens": "answer",
                "retain_weight": 1.2,
                "retain_weight_most": 2.8,
            },
            # There 120 rows of both sides together.
            {"learning_rate": 1.5e-5, "epochs": 8, "batch_size": 60, "schedule": "constant"},
            "arXiv 2504.12996, github.com/LAB-FLAIR/Constrained-Unlearning-for-LLM unlearn.py, layers"
            " 0-5 of 32. There the weight follows a batch's loss against the first epoch's mean,"
            " and is at most 2.3 in the code",
        ),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.trained_share <= 1:
            raise InputError(f"--method.trained_share {self.trained_share}: must be in (0, 1]")
        if not self.noise > 0:
            raise InputError(f"--method.noise {self.noise}: must be positive")
        if self.retain_weight_most < self.retain_weight:
            raise InputError(
                f"--method.retain_weight_most {self.retain_weight_most}: is below"
                f" --method.retain_weight {self.retain_weight}; choose that or more"
            )

    @property
    def needs_retain(self) -> bool:
        """Whether any retain row can have a weight."""
        return self.retain_weight_most > 0

    def check(self, layout: DecoderLayout) -> None:
        """Raises InputError where the model has none of the linear maps to train, or to trace."""
        super().check(layout)
        if self.localization == "traced":
            layout.check_mlp_output("--method.localization traced")

    def count_in(self, layout: DecoderLayout) -> int:
        """How many layers are trained, at least one."""
        return max(1, round(self.trained_share * layout.count))

    def start(self, context: Context) -> LocalizedGradientDifferenceObjective:
        """Finds the layers, makes them trainable and scores the retain rows once as reference."""
        return LocalizedGradientDifferenceObjective(self, context)


class LocalizedGradientDifferenceObjective(GradientObjective):
    """Localized gradient difference at work on one model."""

    _settings: LocalizedGradientDifference

    def __init__(self, settings: LocalizedGradientDifference, context: Context) -> None:
        self._settings = settings
        layout, count = context.layout, settings.count_in(context.layout)
        self._effects: list[float] | None = None
        if settings.localization == "traced":
            self._effects = self._traced(context)
            self._layers = best_window(self._effects, count)
        else:
            self._layers = range(count)
        modules = layout.linears(settings.targets, self._layers)
        super().__init__(
            settings, context, layers=self._layers, weights=named_within(context.model, modules)
        )
        self._before = torch.zeros(0, device=context.device)
        if settings.needs_retain and context.retain:
            sums = self.log_probs_before(context, context.retain, "reference")
            self._before = sums[:, 0] / sums[:, 1].clamp(min=1)

    def _traced(self, context: Context) -> list[float]:
        """Each layer's effect on some forget rows; of a resumed run as it was found."""
        if context.resumed is not None:
            return [float(effect) for effect in context.resumed["layer_effects"]]
        generator = context.generator("causal tracing")
        order = torch.randperm(len(context.forget), generator=generator).tolist()
        rows = [context.forget[index] for index in sorted(order[:_TRACED_ROWS])]
        return layer_effects(context, rows, self._settings.noise, generator)

    def loss(self, forget: Batch, retain: Batch | None) -> Terms:
        """Both terms of L."""
        ascent = -self.cross_entropy(forget)
        settings = self._settings
        if retain is None or not settings.needs_retain:
            return Terms(ascent, None)
        log_probs, mask = self.log_probs(retain)
        rises = self._before[list(retain.indices)] - row_means(log_probs, mask)
        weights = adaptive_weights(rises, settings.retain_weight, settings.retain_weight_most)
        # Of each row its own weight: one number for the batch would change with micro-batches.
        held = -torch.where(mask, log_probs * weights[:, None], 0.0).sum() / mask.sum().clamp(min=1)
        return Terms(ascent, held)

    def notes(self) -> Mapping[str, Any]:
        """The chosen layers and what they were chosen by, too."""
        return {
            **super().notes(),
            "layers": list(self._layers),
            "layer_effects": self._effects,
        }
