"""Muon, and Muon in coordinates in which what a linear map is given is white.

    M <- mu M + (1 - mu) G,   H = (mu M + (1 - mu) G) R^T
    W <- W - eta 0.2 sqrt(max(m, n)) c O(H) R      O(U S V^T) = U V^T, R^-1 R^-T = E[x x^T] + damping

Muon (Jordan et al., 2024), scaled to the size of a step of Adam (arXiv 2502.16982, eq. 4), on W R^-1 in
the place of W, (m, n). R = 1 is Muon itself. With R it is not the matrix that moves as far in every
direction, but what it gives for held inputs x; c keeps the root mean square of the step.

If `normalized`, G / ||G|| stands for G (as by layer in arXiv 1905.11286), so that each step's batch has
the same say in M. Gradients of unlearning differ tenfold from step to step: retain rows give hardly any
at the start, and the steepest of all where one is lost.

Of sharded matrices weights, gradients and momentum stay so; the step of each is made by one process.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from expunge.methods.base import Whitening
from expunge.models.sharding import one_each, sharers, whole

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_PRODUCTS = torch.bfloat16
_LEAST = 1e-7


class Muon(torch.optim.Optimizer):
    """The optimiser; parameters without a gradient are passed over.

    Of sharded parameters every process must have gradients of the same.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        iterations: int = 5,
        normalized: bool = False,
        whitening: Mapping[nn.Parameter, Whitening] | None = None,
    ) -> None:
        """`whitening` holds R of the matrices that have one."""
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "iterations": iterations})
        self._normalized = normalized
        self._whitening = dict(whitening or {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Moves every matrix that has a gradient; `closure` is not called."""
        for group in self.param_groups:
            moved = [matrix for matrix in group["params"] if matrix.grad is not None]
            count = sharers(moved[0]) if moved else 1
            for start in range(0, len(moved), count):
                self._move(moved[start : start + count], group)

    def _move(self, matrices: Sequence[nn.Parameter], group: Mapping[str, Any]) -> None:
        """Moves one matrix, or of sharded ones as many as processes share them, or fewer."""
        updates = []
        for matrix in matrices:
            assert matrix.grad is not None
            gradient, state = matrix.grad, self.state[matrix]
            if self._normalized:
                gradient = gradient / whole(gradient.norm()).clamp(min=_LEAST)
            if not state:
                state["momentum_buffer"] = torch.zeros_like(gradient)
            mean = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
            updates.append(gradient.lerp(mean, group["momentum"]))

        def step(index: int, update: torch.Tensor) -> torch.Tensor:
            return direction(update, group["iterations"], self._whitening.get(matrices[index]))

        for matrix, change in zip(matrices, one_each(updates, step), strict=True):
            matrix.add_(change, alpha=-group["lr"])


def direction(update: torch.Tensor, iterations: int, whitening: Whitening | None = None) -> torch.Tensor:
    """What a matrix moves against at learning rate 1; of the same shape."""
    length = 0.2 * max(update.shape) ** 0.5
    if whitening is None:
        return length * orthogonalised(update, iterations)
    if whitening.turned:
        return direction(update.T, iterations, Whitening(whitening.matrix)).T
    r = whitening.matrix.to(_PRODUCTS)
    flat = orthogonalised(update.to(_PRODUCTS) @ r.T, iterations)
    back = (flat @ r).to(update.dtype)
    return back * (length * flat.to(update.dtype).norm() / back.norm().clamp(min=_LEAST))


def orthogonalised(matrix: torch.Tensor, iterations: int) -> torch.Tensor:
    """U S V^T -> nearly U V^T, by Newton-Schulz iterations in bfloat16.

    Each makes small singular values 3.4 times as long: what is far below the largest stays short.
    """
    first, third, fifth = _COEFFICIENTS
    flat = matrix.to(_PRODUCTS)
    if tall := flat.shape[0] > flat.shape[1]:
        flat = flat.T.contiguous()  # products of a turned one take twice as long
    flat = flat / flat.norm().clamp(min=_LEAST)
    for _ in range(iterations):
        gram = flat @ flat.T
        flat = torch.addmm(
            flat, torch.addmm(gram, gram, gram, beta=third, alpha=fifth), flat, beta=first
        )
    return (flat.T if tall else flat).to(matrix.dtype)
