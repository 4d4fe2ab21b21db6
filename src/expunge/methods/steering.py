"""What RMU and Adaptive RMU share: settings, the three trained projections and the frozen reference.

The loop of both: push h_l of forget text to a target, hold h_l of retain text where it was. Only the
MLP output projections of layers l-2, l-1 and l are trained, and nothing above layer l runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from expunge.data.batches import Batch, Tokens
from expunge.errors import InputError
from expunge.methods.base import Context, Finished, OptimizerSpec, Terms
from expunge.methods.losses import steer
from expunge.models.decoder import DecoderLayout, hidden_states
from expunge.models.weights import snapshot, swapped_in, train_only

TRAINED_LAYERS = 3
_DEPTH = 0.84


@dataclass(frozen=True)
class SteeringSettings:
    """Settings of every method of the RMU family."""

    layer: int | None = None
    """Decoder layer l whose output is steered, from 0; null: at 84% of the depth (26 of 32)."""
    alpha: float = 30.0
    """Weight of the retain term."""
    direction_kind: Literal["gaussian", "uniform"] = "gaussian"
    """How a direction is drawn; `uniform` is the published one, with positive entries only."""
    tokens: Tokens = "all"
    """Which tokens the two terms are taken over."""

    def __post_init__(self) -> None:
        if self.alpha < 0:
            raise InputError(f"--method.alpha {self.alpha}: must be 0 or more")

    @property
    def needs_retain(self) -> bool:
        """Whether the loss has a retain term."""
        return self.alpha > 0

    @property
    def has_adapter(self) -> bool:
        """Never: the weights themselves are trained."""
        return False

    def check(self, layout: DecoderLayout) -> None:
        """Raises InputError where the layer and the two below it are not all there."""
        layout.check_layer(self.layer_in(layout), TRAINED_LAYERS - 1, "--method.layer")

    def layer_in(self, layout: DecoderLayout) -> int:
        """The layer to steer: the chosen one, or the SemEval 7B choice at this depth."""
        if self.layer is not None:
            return self.layer
        return max(TRAINED_LAYERS - 1, round(_DEPTH * layout.count) - 1)


class SteeringObjective:
    """Trains three projections of one model."""

    optimizer = OptimizerSpec("adamw", {"weight_decay": 0.0})

    def __init__(self, settings: SteeringSettings, context: Context) -> None:
        self._model = context.model
        self._layout = context.layout
        self._alpha, self._tokens = settings.alpha, settings.tokens
        self.layer = settings.layer_in(context.layout)
        names = [
            context.layout.mlp_output_weight(index)
            for index in range(self.layer - TRAINED_LAYERS + 1, self.layer + 1)
        ]
        self._dtype = context.model.dtype
        self.parameters: Mapping[str, nn.Parameter] = train_only(context.model, names)
        self._frozen = {name: value.detach().clone() for name, value in self.parameters.items()}

    def states(self, batch: Batch) -> torch.Tensor:
        """h_l of the model as it is, (rows, tokens, width)."""
        return hidden_states(self._model, self._layout, self.layer, batch)

    def frozen_states(self, batch: Batch) -> torch.Tensor:
        """h_l of the model as it was, without gradients."""
        with swapped_in(self.parameters, self._frozen):
            return self.states(batch)

    def terms(self, forget: Batch, target: torch.Tensor, retain: Batch | None) -> Terms:
        """Both terms for a target of the forget states; the retain term carries its weight."""
        forget_term = steer(self.states(forget), target, forget.mask(self._tokens))
        if retain is None or self._alpha == 0:
            return Terms(forget_term, forget_term, None)
        drift = steer(self.states(retain), self.frozen_states(retain), retain.mask(self._tokens))
        return Terms(forget_term + self._alpha * drift, forget_term, self._alpha * drift)

    def notes(self) -> Mapping[str, Any]:
        """The layer that is steered and the weights that are trained."""
        return {"layer": self.layer, "trained": list(self.parameters)}

    def set_training(self, active: bool) -> None:
        """Nothing to do: the model has no dropout of ours."""

    def curvature(self, batch: Batch) -> list[torch.Tensor]:
        """Never asked for: the optimiser is AdamW."""
        raise NotImplementedError

    def initial_curvature(self) -> list[torch.Tensor] | None:
        """None: the optimiser is AdamW."""
        return None

    def finish(self, *, keep_adapter: bool) -> Finished:
        """Casts the trained weights to the model's dtype, once; returns them in float32."""
        del keep_adapter  # refused for this family before the run
        weights = snapshot(self.parameters)
        for parameter in self.parameters.values():
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(self._dtype)
        return Finished(weights)
