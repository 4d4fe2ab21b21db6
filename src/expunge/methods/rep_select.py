"""RepSelect: one gradient of the forget loss, without what it shares with all text (arXiv 2606.17168).

An adapter takes one epoch of descent on the forget loss: an adversary that has begun to relearn. Beside
it, frozen, G is the gradient of the forget text's log-likelihood in every trained matrix, a mean over
tokens, from one pass. Its main singular directions are those that other text uses too, and that
relearning would take, so the first k of them are made as weak as the last of these, on both sides:

    G' = G - U_k (I - s_k^2 / S_k^2) U_k^T G,   G = U S V^T,   W <- W - r G'

which leaves them the singular values s_k^2 / S. The adapter is taken out again, not merged. Every step
of the run goes the same way and needs no pass; the checkpoint choice says how far.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from expunge.data.batches import Batch, Tokens
from expunge.errors import InputError, RunError
from expunge.methods.base import Context, OptimizerSpec, RunDefaults, Terms
from expunge.methods.gradient import GradientObjective, TokenSettings
from expunge.methods.influence_step import InfluenceStep
from expunge.models.decoder import Targets
from expunge.models.lora import Adapter, LoraShape

_ROUNDING = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class RepSelect(TokenSettings):
    """Settings of RepSelect."""

    targets: Targets = "mlp"
    """Which linear maps of a decoder layer are trained."""
    tokens: Tokens = "answer"
    """Which tokens the gradient is of: all, the output given the input, or of questions the output
    only."""
    components: float = 0.125
    """Share of a matrix's singular directions that is weakened, the main ones; published are 512 of
    4096."""
    adversary_rank: int = 8
    """Rank of the adapter that relearns before the gradient is taken; it is scaled by 1."""
    adversary_rate: float = 0.01
    """Learning rate of its one epoch of SGD; 0: the gradient is the target's own."""

    name: ClassVar[str] = "rep-select"
    defaults: ClassVar[RunDefaults] = RunDefaults(epochs=10, batch_size=16, learning_rate=75.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.components < 1:
            raise InputError(f"--method.components {self.components}: must be between 0 and 1")
        if self.adversary_rank < 1:
            raise InputError(f"--method.adversary_rank {self.adversary_rank}: must be 1 or more")

    def start(self, context: Context) -> RepSelectObjective:
        """Finds the way that every step goes; a resumed run has it already."""
        return RepSelectObjective(self, context)


class RepSelectObjective(GradientObjective):
    """RepSelect at work on one model, as a loss that is linear in the weights."""

    # Nothing is clipped: it would change how far a step goes.
    optimizer = OptimizerSpec("sgd", in_backward=True)

    def __init__(self, settings: RepSelect, context: Context) -> None:
        names = [f"{name}.weight" for name in context.layout.linears(settings.targets)]
        super().__init__(settings, context, weights=names)
        self._device = context.device
        self._directions: Mapping[str, torch.Tensor] = {}
        if context.resumed is None:
            self._found: Mapping[str, Any] = self._find(settings, context)
        else:  # the directions are put back
            self._found = context.resumed["rep_select"]

    def _find(self, settings: RepSelect, context: Context) -> Mapping[str, Any]:
        """Sets the directions; what was measured of them."""
        rank = settings.adversary_rank
        shape = LoraShape(rank, rank, 0.0, settings.targets)
        seed = context.seed_of("adversary")
        adapter = Adapter(context.model, context.layout, shape, seed)
        descent = torch.optim.SGD(adapter.parameters.values(), lr=settings.adversary_rate)
        for batch in context.passes(context.forget, "adversary"):
            with context.autocast():
                self.cross_entropy(batch).backward()
            descent.step()
            descent.zero_grad()
        for factor in adapter.parameters.values():
            factor.requires_grad_(False)
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        directions = InfluenceStep(self, context).forget_gradient(context.forget)
        adapter.take_out()
        whole, used_up, least = _norm(directions), 0, settings.components
        for name, gradient in directions.items():
            side = min(gradient.shape)
            count = max(1, round(settings.components * side))
            directions[name], found = collapsed(-gradient, count)
            if 1 < found <= count:
                used_up, least = used_up + 1, min(least, found / 2 / side)
        if used_up == len(directions):
            raise RunError(
                f"--method.components {settings.components}: no direction of the forget gradient is left"
                f" beyond those, the forget set has too few tokens; set it to {least:.2g}"
            )
        self._directions = directions
        return {"gradient_norm": whole, "direction_norm": _norm(directions), "used_up": used_up}

    def loss(self, forget: Batch, retain: Batch | None) -> Terms:
        """<G', W>, whose gradient is G' whatever the batch.

        It falls by the mean log-likelihood that forget tokens are foreseen to lose.
        """
        products = [(d * self.parameters[name]).sum() for name, d in self._directions.items()]
        return Terms(torch.stack(products).sum(), None)

    @property
    def state_tensors(self) -> Mapping[str, torch.Tensor]:
        """The directions: a resumed run makes no pass."""
        return self._directions

    def restore(self, calibration: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Puts the directions back."""
        self._directions = {name: tensor.to(self._device) for name, tensor in tensors.items()}

    def notes(self) -> Mapping[str, Any]:
        """Norms of G and G', and how many matrices had no direction beyond those weakened."""
        return {**super().notes(), "rep_select": self._found}


def collapsed(gradient: torch.Tensor, count: int) -> tuple[torch.Tensor, int]:
    """G' of a gradient with its `count` main singular directions weakened, and its numerical rank.

    gradient (m, n) -> (m, n). Both sides are weakened by s_k / S in the paper, which is once by its
    square on the smaller side, whose eigenvectors are found in float64. No more directions are weakened
    than the rank, so that s_k is above rounding.
    """
    turned = gradient.shape[0] > gradient.shape[1]
    flat = (gradient.T if turned else gradient).double()
    squares, axes = torch.linalg.eigh(flat @ flat.T)  # ascending
    # Rounding of float32 entries gives values of about this over the root of the side.
    rank = int((squares > _ROUNDING**2 * squares.sum()).sum())
    first = len(squares) - min(count, rank)
    if first == len(squares):
        return gradient, 0
    axes, shrink = axes[:, first:], 1 - squares[first] / squares[first:]
    flat = flat - (axes * shrink) @ (axes.T @ flat)
    return (flat.T if turned else flat).to(gradient.dtype).contiguous(), rank


def _norm(tensors: Mapping[str, torch.Tensor]) -> float:
    return float(torch.stack([tensor.norm() for tensor in tensors.values()]).norm())
