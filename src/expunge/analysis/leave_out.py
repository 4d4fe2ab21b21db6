"""What leaving rows out of training would do, by influence functions on the linear maps of a model.

    self-influence of a forget row n    I_n = grad l_n^T (H + lambda)^-1 grad S_n / N
    collateral of a retain row m        C_m = grad l_m^T (H + lambda)^-1 sum_n grad S_n / N, n in forget

S is a row's loss summed over its T counted tokens, l = S / T, N the counted tokens of both sets, which
stand for the training set. Both predict by how many nats a token the row's loss *rises*, the first if
this row alone, the second if the whole forget set had never been trained on: positive is a loss that
gets worse. Koh and Liang, arXiv 1703.04730, eq. 2, with the sign of removal. H is the Fisher matrix of
the mean token loss over both sets, see `curvature`. With conjugate gradients the collateral's H is the
Gauss-Newton matrix of the retain rows, whole, and its step is Newton's without the forget set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from expunge.analysis.row_gradients import (
    Known,
    RowGradients,
    Windows,
    along,
    block_shape,
    blocks_of_zeros,
    gradient_of,
)
from expunge.errors import RunError
from expunge.maths.conjugate_gradients import Blocks, Solved, conjugate_gradients
from expunge.maths.curvature import (
    Curvature,
    DampingUnit,
    DiagonalCurvature,
    EigenbasisCurvature,
)
from expunge.maths.fisher import FactorCovariances
from expunge.terminal import counting

CurvatureKind = Literal["diagonal", "ekfac", "cg"]
TOLERANCE, MOST_ITERATIONS = 0.1, 50
"""Of conjugate gradients: the residual's norm in shares of the gradient's. Against retraining 0.01 ranks
rows no better, at four times the iterations."""
Report = Callable[[str, int, int], None]
"""Called with a phase's name, what is done and what there is to do."""


@dataclass(frozen=True)
class LeaveOut:
    """What is predicted and measured of the rows, in their order."""

    forget: Sequence[Known]
    retain: Sequence[Known]
    self_influence: Sequence[float]
    """Of each forget row, in nats a token; never negative."""
    collateral: Sequence[float]
    """Of each retain row, in nats a token; positive where its loss rises."""
    mean_fisher: float
    damping: float
    """lambda, in the units of the curvature."""
    tokens: int
    """N, the counted tokens of both sets."""
    residuals: Sequence[float] = ()
    """Of conjugate gradients, before the first iteration and after each."""


def leave_out(
    passes: RowGradients,
    forget: Sequence[Windows],
    retain: Sequence[Windows],
    kind: CurvatureKind = "diagonal",
    damping: float = 1.0,
    unit: DampingUnit = "mean-fisher",
    report: Report = lambda _name, _done, _total: None,
) -> LeaveOut:
    """Predicts for each forget row what it owes to itself, for each retain row what removal costs it.

    `damping` is lambda, in `unit`. Two passes over all rows, with EK-FAC one more and one over the
    forget rows, with conjugate gradients as much as three over the retain rows an iteration. Memory
    beside the model: two float32 copies of the maps, with EK-FAC the bases too, with conjugate
    gradients five more copies. Raises RunError where no prediction is finite.
    """
    every = [*forget, *retain]
    removed = blocks_of_zeros(passes.maps)
    # The gradients of a diagonal are those that are summed, so one pass does.
    if kind == "diagonal":
        curvature: Curvature = _diagonal(passes, every, report, (removed, len(forget)))
    else:
        curvature = _ekfac(passes, every, report)
    tokens = passes.counted(every)
    mean_fisher = curvature.mean()
    curvature.damping = damping * (mean_fisher if unit == "mean-fisher" else 1.0)
    if not 0 < curvature.damping < float("inf"):
        raise RunError(
            f"the mean of the curvature is {mean_fisher:.3g}, no damping follows from it; give"
            " --damping with --damping-unit absolute, or use --dtype float32"
        )

    def gather(name: str, _place: int, inputs: torch.Tensor, gradients: torch.Tensor) -> None:
        removed[name].add_(gradient_of(inputs, gradients))

    if retain and kind != "diagonal":
        passes.run(forget, gather, _counting(report, "forget gradient", len(forget)))
    for block in removed.values():
        block.div_(tokens)
    if kind == "cg" and retain:
        step = _newton(passes, retain, removed, curvature, tokens, report)
    else:
        # One block at a time: no third copy of the maps.
        step = Solved({n: curvature.solve(n, removed.pop(n)) for n in list(removed)}, ())
    energies = [0.0] * len(forget)
    rises = [0.0] * len(retain)

    def predict(name: str, place: int, inputs: torch.Tensor, gradients: torch.Tensor) -> None:
        if place < len(forget):
            energies[place] += float(curvature.energy(name, gradient_of(inputs, gradients)))
        else:
            rises[place - len(forget)] += float(along(inputs, gradients, step.solution[name]))

    known = passes.run(every, predict, _counting(report, "influence", len(every)))
    counts = [max(1, row.tokens) for row in known]
    found = LeaveOut(
        forget=known[: len(forget)],
        retain=known[len(forget) :],
        self_influence=[
            energy / (tokens * count) for energy, count in zip(energies, counts, strict=False)
        ],
        collateral=[rise / count for rise, count in zip(rises, counts[len(forget) :], strict=True)],
        mean_fisher=mean_fisher,
        damping=curvature.damping,
        tokens=tokens,
        residuals=step.residuals,
    )
    if not all(torch.isfinite(torch.tensor([*found.self_influence, *found.collateral]))):
        raise RunError("an influence is not finite; use --dtype float32, or set --damping higher")
    return found


def _newton(
    passes: RowGradients,
    retain: Sequence[Windows],
    gradient: Blocks,
    curvature: Curvature,
    tokens: int,
    report: Report,
) -> Solved:
    """(G + lambda)^-1 gradient, G the Gauss-Newton matrix of the retain rows' losses over N.

    Without the forget rows their losses are all that is trained on, and this is its Newton step.
    """
    advance = _counting(report, "conjugate gradients", MOST_ITERATIONS)

    def product(direction: Blocks) -> Blocks:
        found = passes.gauss_newton(retain, direction)
        for name, block in found.items():
            block.div_(tokens).add_(direction[name], alpha=curvature.damping)
        return found

    def precondition(residual: Blocks) -> Blocks:
        return {name: curvature.solve(name, block) for name, block in residual.items()}

    return conjugate_gradients(product, gradient, precondition, TOLERANCE, MOST_ITERATIONS, advance)


def _diagonal(
    passes: RowGradients,
    rows: Sequence[Windows],
    report: Report,
    added: tuple[Mapping[str, torch.Tensor], int],
) -> DiagonalCurvature:
    """Sum of every row's squared gradient over the tokens of all: the mean token loss's Fisher.

    With the tokens' gradients taken for uncorrelated. `added` are sums that the gradients of so many of
    the first rows are added to on the way.
    """
    fisher = blocks_of_zeros(passes.maps)

    def square(name: str, place: int, inputs: torch.Tensor, gradients: torch.Tensor) -> None:
        gradient = gradient_of(inputs, gradients)
        fisher[name].addcmul_(gradient, gradient)
        if place < added[1]:
            added[0][name].add_(gradient)

    advance = _counting(report, "Fisher", len(rows))
    passes.run(rows, square, advance)
    tokens = passes.counted(rows)
    for block in fisher.values():
        block.div_(tokens)
    return DiagonalCurvature(fisher)


def _ekfac(passes: RowGradients, rows: Sequence[Windows], report: Report) -> EigenbasisCurvature:
    """The same Fisher as a diagonal in the eigenbasis of each map's inputs and output gradients.

    Two passes, for the bases and for the eigenvalues (arXiv 2308.03296, section 2.2). Raises RunError
    where a covariance is not finite.
    """
    advance = _counting(report, "EK-FAC", 2 * len(rows))
    covariances = FactorCovariances(passes.maps.items(), block_shape)

    def add(name: str, _place: int, inputs: torch.Tensor, gradients: torch.Tensor) -> None:
        covariances.add(name, inputs, gradients)

    passes.run(rows, add, advance)
    bases = covariances.bases()
    squares = blocks_of_zeros(passes.maps)

    def square(name: str, _place: int, inputs: torch.Tensor, gradients: torch.Tensor) -> None:
        basis = bases[name]
        squares[name] += gradient_of(inputs @ basis.inputs, gradients @ basis.outputs).square_()

    passes.run(rows, square, advance)
    tokens = passes.counted(rows)
    return EigenbasisCurvature(bases, {name: block.div_(tokens) for name, block in squares.items()})


def _counting(report: Report, phase: str, total: int) -> Callable[[int], None]:
    return counting(lambda done: report(phase, done, total))
