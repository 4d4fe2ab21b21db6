"""Chunked gradient difference: the forget set chunk by chunk, each beside many retain rows.

    L = -mean_F CE(row) + w * mean_R CE(row)

over rows, each the mean of its own tokens, so that a two-word answer counts as much as a document. The
forget set is cut into chunks; each is trained on for all its passes, with `retain_ratio` times as many
retain rows, taken in turn, before the next one begins. Only the last layers are trained, or an adapter.
Premptis et al. (AILS-NTUA, first at SemEval-2025 Task 4), arXiv 2503.02443, "Sequential Unlearning with
Gradient Difference". Unbounded: the run is saved by its checkpoint choice or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from expunge.data.batches import Batch
from expunge.data.sampling import Sampling
from expunge.errors import InputError
from expunge.maths.numerics import row_means
from expunge.methods.base import Context, Preset, RunDefaults, Terms
from expunge.methods.gradient import GradientObjective, GradientSettings
from expunge.models.decoder import DecoderLayout
from expunge.models.weights import named_within


@dataclass(frozen=True)
class ChunkedGradientDifference(GradientSettings):
    """Settings of chunked gradient difference."""

    parameters: Literal["lora", "full"] = "full"
    """Train a low-rank adapter, or every weight, of the last layers."""
    trained_share: float = 0.25
    """Share of the decoder layers that is trained, from the last one down (8 of 32)."""
    retain_weight: float = 3.5
    """Weight of the retain term."""
    retain_ratio: int = 7
    """Retain rows of a step for each forget row."""
    chunk_size: int = 32
    """Forget rows of a chunk, in the order of the file."""
    rounds: int = 1
    """Passes over the chunks, each with its part of the epochs. With 1 a chunk is not seen again
    after the next one has begun."""

    name: ClassVar[str] = "chunked-gradient-difference"
    defaults: ClassVar[RunDefaults] = RunDefaults(epochs=7, batch_size=4, learning_rate=6e-4)
    presets: ClassVar[Mapping[str, Preset]] = {
        "semeval-7b": Preset(
            {
                "parameters": "full",
                "trained_share": 0.25,
                "tokens": "answer",
                "retain_weight": 3.5,
                "retain_ratio": 7,
                "chunk_size": 32,
                "rounds": 1,
            },
            {"learning_rate": 1e-5, "epochs": 7, "batch_size": 1, "schedule": "constant"},
            "arXiv 2503.02443, github.com/iraklis07/llm-unlearning configs/sequential_args.json: a"
            " retain factor of 0.5 for each of seven rows is a weight of 3.5 of their mean",
        ),
        "semeval-lora": Preset(
            {
                "parameters": "lora",
                "trained_share": 1.0,
                "rank": 16,
                "lora_alpha": 64.0,
                "tokens": "answer",
                "retain_weight": 3.5,
                "retain_ratio": 7,
                "chunk_size": 32,
                "rounds": 1,
            },
            {"learning_rate": 1e-5, "epochs": 7, "batch_size": 1, "schedule": "constant"},
            "arXiv 2503.02443, github.com/iraklis07/llm-unlearning configs/sequential_args.json with"
            " apply_lora",
        ),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.trained_share <= 1:
            raise InputError(f"--method.trained_share {self.trained_share}: must be in (0, 1]")
        for option in ("retain_ratio", "chunk_size", "rounds"):
            if getattr(self, option) < 1:
                raise InputError(f"--method.{option} {getattr(self, option)}: must be 1 or more")

    @property
    def sampling(self) -> Sampling:
        """Chunk after chunk, with so many retain rows for each forget row."""
        return Sampling(self.retain_ratio, self.chunk_size, self.rounds)

    def layers_in(self, layout: DecoderLayout) -> range:
        """The layers that are trained, at least one."""
        return range(layout.count - max(1, round(self.trained_share * layout.count)), layout.count)

    def start(self, context: Context) -> ChunkedGradientDifferenceObjective:
        """Makes the last layers trainable."""
        return ChunkedGradientDifferenceObjective(self, context)


class ChunkedGradientDifferenceObjective(GradientObjective):
    """Chunked gradient difference at work on one model; the loop draws the chunks."""

    def __init__(self, settings: ChunkedGradientDifference, context: Context) -> None:
        self._layers = settings.layers_in(context.layout)
        modules = [f"{context.layout.layers}.{index}" for index in self._layers]
        super().__init__(
            settings,
            context,
            layers=self._layers,
            weights=named_within(context.model, modules),
        )
        self._weight = settings.retain_weight

    def forget_size(self, batch: Batch) -> int:
        """Both terms are means over rows."""
        return len(batch.examples)

    def retain_size(self, batch: Batch) -> int:
        """Both terms are means over rows."""
        return len(batch.examples)

    def loss(self, forget: Batch, retain: Batch | None) -> Terms:
        """Both terms of L."""
        ascent = row_means(*self.log_probs(forget)).mean()
        if retain is None or self._weight == 0:
            return Terms(ascent, None)
        return Terms(ascent, -self._weight * row_means(*self.log_probs(retain)).mean())

    def notes(self) -> Mapping[str, Any]:
        """The layers that are trained, too."""
        return {**super().notes(), "layers": list(self._layers)}
