"""What RMU and Adaptive RMU share: settings, the three trained projections and the frozen reference.

The loop of both: push h_l of forget text to a target, hold h_l of retain text where it was. Only the
MLP output projections of layers l-2, l-1 and l are trained, and nothing above layer l runs. Hidden
states are flat, (tokens, width): rows one after the other without padding.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import nn
from torch.nn import functional

from expunge.data.batches import Batch, Tokens
from expunge.errors import InputError
from expunge.maths.calibration import NeverSeen
from expunge.maths.losses import steer
from expunge.methods.base import (
    Context,
    Finished,
    Method,
    Objective,
    OptimizerSpec,
    Terms,
    check_numbers,
    check_random_rows,
)
from expunge.models.decoder import DecoderLayout, hidden_states
from expunge.models.weights import snapshot, swapped_in, train_only

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRAINED_LAYERS = 3
_DEPTH = 0.84
_OPTIMIZERS = {
    "adamw": OptimizerSpec("adamw", {"weight_decay": 0.0}),
    # Its updates have a root mean square of 0.2 times the rate; the first ones of AdamW have 1.
    "muon": OptimizerSpec("muon", rate_scale=5.0),
}


@dataclass(frozen=True)
class SteeringSettings(Method):
    """Settings of every method of the RMU family."""

    layer: int | Literal["auto"] = "auto"
    """Decoder layer l whose output is steered, from 0; auto: chosen by a pass over sampled rows.
    `expunge analyze layers` shows it."""
    alpha: float = 40.0
    """Weight of the retain term."""
    direction_kind: Literal["gaussian", "uniform"] = "gaussian"
    """How a direction is drawn; `uniform` is the published one, with positive entries only."""
    tokens: Tokens = "all"
    """Which tokens' states are held in retain rows."""
    forget_tokens: Tokens = "content"
    """Which tokens' states are steered in forget rows: all of them, or those that predict a counted
    token."""
    row_balance: float = 0.5
    """From 0, every token of the forget rows counts alike as published, to 1, every row does. A question
    has few tokens to steer and is left alone among documents where all tokens count alike."""
    retain_noise: float = 0.0
    """Random noise augmentation: Gaussian noise on the frozen states that retain rows are held to,
    its length in units of the state's own (arXiv 2501.19202). A forget token in other text is to do
    less harm; the audit's attack `trigger` measures it."""
    random_rows: int = 256
    """Rows of random tokens that are held as retain rows are. They stand for all text that no set
    lists. Without them utility moves by chance."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """Optimiser of the projections: Muon (arXiv 2502.16982), or AdamW as published. Muon moves all
    directions of a matrix alike, and needs less than half the steps."""
    calibration_gain: float = 0.5
    """How far a row's strength moves for a loss that is wrong by that of a non-member. It needs
    non-members; 0 steers every row all the way."""

    def __post_init__(self) -> None:
        if isinstance(self.layer, str) and self.layer != "auto":
            raise InputError(f"--method.layer {self.layer}: give a layer's number, or auto")
        if not 0 <= self.row_balance <= 1:
            raise InputError(f"--method.row_balance {self.row_balance}: must be in [0, 1]")
        check_numbers(self)
        check_random_rows(self.random_rows)

    @property
    def needs_retain(self) -> bool:
        """Whether the loss has a retain term."""
        return self.alpha > 0

    def check(self, layout: DecoderLayout) -> None:
        """Raises InputError where the layer and the two below it are not all there."""
        layout.check_mlp_output(f"--method {self.name}")
        if layout.count < TRAINED_LAYERS:
            raise InputError(
                f"--method {self.name}: trains {TRAINED_LAYERS} layers in a row, the model has"
                f" {layout.count}; unlearn it with expunge run --method spectral"
            )
        layout.check_layer(self.layer_in(layout), TRAINED_LAYERS - 1, "--method.layer")

    def trained_layers(self, layout: DecoderLayout) -> tuple[int, int]:
        """The first and the last layer that a step has to run."""
        last = self.layer_in(layout)
        return last - TRAINED_LAYERS + 1, last

    def layer_in(self, layout: DecoderLayout) -> int:
        """The layer to steer; where it is yet to be chosen, the deepest that can be."""
        return layout.count - 1 if self.layer == "auto" else self.layer


def candidate_layers(layout: DecoderLayout) -> range:
    """The layers that can be steered: those with enough layers below them to be trained."""
    return range(TRAINED_LAYERS - 1, layout.count)


def usual_layer(layout: DecoderLayout) -> int:
    """The layer at the depth of the SemEval 7B choice, 26 of 32."""
    return max(TRAINED_LAYERS - 1, round(_DEPTH * layout.count) - 1)


class HiddenStates(Protocol):
    """h_l of a batch, (tokens, width), in the model as it is and as it was."""

    path: str
    """How it is computed, for the manifest."""

    def freeze(self, trained: Mapping[str, nn.Parameter]) -> None:
        """Takes the present values of the trained parameters as those of the frozen model."""

    def now(self, *batches: Batch) -> list[torch.Tensor]:
        """Of the model as it is, for each batch, with gradients."""

    def before(self, batch: Batch) -> torch.Tensor:
        """Of the frozen model, without gradients."""

    def norms_before(self, batch: Batch) -> torch.Tensor:
        """Norms of the frozen model's, (tokens,)."""


class HookedStates:
    """h_l from the model's own forward pass, ended at layer l, for models that cannot be cut."""

    path = "hooks"

    def __init__(self, model: PreTrainedModel, layout: DecoderLayout, layer: int) -> None:
        self._model, self._layout, self._layer = model, layout, layer
        self._trained: Mapping[str, nn.Parameter] = {}
        self._frozen: Mapping[str, torch.Tensor] = {}

    def freeze(self, trained: Mapping[str, nn.Parameter]) -> None:
        """Keeps a copy of the trained parameters: one model is its own reference."""
        self._trained = trained
        self._frozen = {name: value.detach().clone() for name, value in trained.items()}

    def now(self, *batches: Batch) -> list[torch.Tensor]:
        """One padded pass for each batch."""
        return [
            batch.packed(hidden_states(self._model, self._layout, self._layer, batch))
            for batch in batches
        ]

    def before(self, batch: Batch) -> torch.Tensor:
        """A pass with the copies in the place of the trained parameters."""
        with swapped_in(self._trained, self._frozen):
            return self.now(batch)[0]

    def norms_before(self, batch: Batch) -> torch.Tensor:
        """Norms of that pass."""
        return self.before(batch).float().norm(dim=-1)


class SteeringObjective(Objective):
    """Trains three projections of one model."""

    def __init__(self, settings: SteeringSettings, context: Context) -> None:
        if settings.layer == "auto":
            raise RuntimeError("the layer must be chosen before a steering method starts")
        self.optimizer = _OPTIMIZERS[settings.optimizer]
        self._alpha = settings.alpha
        self._tokens, self._forget_tokens = settings.tokens, settings.forget_tokens
        self._noise = settings.retain_noise
        self._gain, self._balance = settings.calibration_gain, settings.row_balance
        self._strengths: dict[str, float] = {}
        self._dtype = context.model.dtype
        first, self.layer = settings.trained_layers(context.layout)
        names = [context.layout.mlp_output_weight(i) for i in range(first, self.layer + 1)]
        self.hidden: HiddenStates = context.engine or HookedStates(
            context.model, context.layout, self.layer
        )
        self.parameters = train_only(context.model, names)
        self.hidden.freeze(self.parameters)

    def terms(self, forget: Batch, target: torch.Tensor, retain: Batch | None) -> Terms:
        """Both terms for a target of the forget states; the retain term carries its weight."""
        if retain is None or self._alpha == 0:
            (states,) = self.hidden.now(forget)
            return Terms(steer(states, target, forget.packed(self._weights(forget))), None)
        states, retain_states = self.hidden.now(forget, retain)
        forget_term = steer(states, target, forget.packed(self._weights(forget)))
        before, held = self.hidden.before(retain), retain.packed(self._held(retain).float())
        if self._noise:
            before = with_noise(before, retain, self._noise)
        return Terms(forget_term, self._alpha * steer(retain_states, before, held))

    def _forgotten(self, batch: Batch) -> torch.Tensor:
        return _states_of(batch, self._forget_tokens)

    def _weights(self, batch: Batch) -> torch.Tensor:
        """What each token of a forget batch counts, (rows, tokens): its row's size ** -balance."""
        return row_weights(self._forgotten(batch), self._balance)

    def _held(self, batch: Batch) -> torch.Tensor:
        return _states_of(batch, self._tokens)

    def forget_size(self, batch: Batch) -> float:
        """A weighted mean over tokens."""
        return float(self._weights(batch).sum())

    def retain_size(self, batch: Batch) -> int:
        """A mean over tokens."""
        return int(self._held(batch).sum())

    def notes(self) -> Mapping[str, Any]:
        """The layer that is steered, the weights that are trained, and how states are computed."""
        return {
            "layer": self.layer,
            "trained": list(self.parameters),
            "hidden_states": self.hidden.path,
        }

    @property
    def calibration(self) -> Mapping[str, Any]:
        """Calibrated rows' share of the way to their target, from 0 to 1."""
        return self._strengths

    def restore(self, calibration: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Puts back what `calibration` was."""
        self._strengths = dict(calibration)

    def calibrate(self, rows: NeverSeen) -> None:
        """Moves each row's target along the line from its frozen states to the full target."""
        for row, loss in rows.losses.items():
            missing = (rows.wanted[row] - loss) / rows.scale
            changed = self._strengths.get(row, 1.0) + self._gain * missing
            self._strengths[row] = min(1.0, max(0.0, changed))

    def weakened(self, target: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The target of every token moved back towards its frozen state, (tokens, width)."""
        strengths = [self._strengths.get(row, 1.0) for row in batch.row_ids]
        if all(strength == 1.0 for strength in strengths):
            return target
        lengths = torch.tensor(batch.lengths, device=target.device)
        share = torch.tensor(strengths, device=target.device).repeat_interleave(lengths)[:, None]
        return torch.lerp(self.hidden.before(batch).float(), target, share)

    def finish(self, *, keep_adapter: bool) -> Finished:
        """Casts the trained weights to the model's dtype, once; returns them in float32."""
        del keep_adapter  # refused for this family before the run
        weights = snapshot(self.parameters)
        for parameter in self.parameters.values():
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(self._dtype)
        return Finished(weights)


def with_noise(states: torch.Tensor, batch: Batch, share: float) -> torch.Tensor:
    """h + share * ||h|| * e with e of unit length on average, for every token: (tokens, width).

    Drawn for each row from the step's seed and the row's id, so that a row gets the same noise
    whatever it is batched with and in whichever process.
    """
    seed, width = torch.initial_seed(), states.shape[-1]
    drawn = []
    for row, length in zip(batch.row_ids, batch.lengths, strict=True):
        generator = torch.Generator().manual_seed((seed + zlib.crc32(row.encode())) % 2**63)
        drawn.append(torch.randn(length, width, generator=generator))
    noise = torch.cat(drawn).to(states.device) / width**0.5
    values = states.float()
    return values + share * values.norm(dim=-1, keepdim=True) * noise


def row_weights(mask: torch.Tensor, balance: float) -> torch.Tensor:
    """Weights of the masked tokens, (rows, tokens): n ** -balance in a row of n, 0 elsewhere.

    A row then counts n ** (1 - balance): all tokens alike for 0, all rows alike for 1.
    """
    sizes = mask.sum(dim=1, keepdim=True).clamp(min=1).float()
    return torch.where(mask, sizes**-balance, 0.0)


def _states_of(batch: Batch, tokens: Tokens) -> torch.Tensor:
    """Mask of the states that a term is taken over, (rows, tokens)."""
    mask = batch.mask(tokens)
    if tokens == "all":
        return mask
    # What is said of a token is decided by the state of the one before it.
    return functional.pad(mask[:, 1:], (0, 1))
