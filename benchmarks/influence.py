"""Influence functions against the truth: a tiny model retrained without the rows, again and again.

    python benchmarks/influence.py --seeds 5 --output influence.md

Truth: a two-layer decoder is trained to its minimum on all rows (full batches, L-BFGS, a quadratic
penalty that makes the minimum one), then from there again without a row, or without a group of rows,
and the change of a row's loss is what leaving out did. A minimum that was not reached ends the
benchmark: what training goes on to do anyhow would be taken for what leaving out did. Predictions are
those of `expunge analyze influence`, damped by the penalty; `exact` puts the objective's own Hessian
in the place of the curvature and is as far as a linear prediction can go. Self: the left-out row's own
loss, over the rows that were left out alone. Collateral: the losses of all other rows as a group is
left out, the mean of the rank correlations over the groups.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import minimize
from scipy.stats import spearmanr
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from expunge.analysis.leave_out import LeaveOut, leave_out
from expunge.analysis.row_gradients import RowGradients, linear_maps
from expunge.data.batches import Batch, collate
from expunge.data.tokenization import Example
from expunge.models.decoder import find_layout
from expunge.reporting.tables import markdown

_STEPS, _RATE, _FLAT = 600, 2e-2, 1e-5
_MOST_ITERATIONS = {"all rows": 10_000, "left out": 5_000}
VOCABULARY, LENGTH, TOPICS, WIDTH = 24, 9, 4, 8
KINDS = ("diagonal", "ekfac", "cg")


@dataclass(frozen=True)
class Problem:
    """A trained tiny model and its rows."""

    model: Any
    examples: Sequence[Example]
    penalty: float
    """Weight of half the squared norm of the trained weights, beside the mean token loss."""
    seed: int
    first_layer: int
    """Maps of layers from this one on are trained, all else is frozen."""


@dataclass(frozen=True)
class Truth:
    """How losses changed, in nats a token."""

    own: Mapping[int, float]
    """Of a row, when it alone was left out."""
    groups: Sequence[tuple[Sequence[int], Sequence[float]]]
    """The rows left out together, and the change of every row's loss."""


def make_problem(seed: int, rows: int = 160, penalty: float = 1e-2, first_layer: int = 0) -> Problem:
    """Rows of a few topics, with words that vary, learned by a two-layer GPT-NeoX of width 8."""
    from transformers import AutoConfig, AutoModelForCausalLM

    generator = torch.Generator().manual_seed(seed)
    topics = torch.randint(1, VOCABULARY, (TOPICS, LENGTH), generator=generator)
    examples = []
    for number in range(rows):
        ids = topics[int(torch.randint(TOPICS, (), generator=generator))].clone()
        changed = torch.rand(LENGTH, generator=generator) < 0.3
        ids[changed] = torch.randint(1, VOCABULARY, (LENGTH,), generator=generator)[changed]
        token = (False,) + (True,) * (LENGTH - 1)
        answer = tuple(place > LENGTH // 2 for place in range(LENGTH))
        examples.append(Example(f"row-{number}", "t", tuple(ids.tolist()), token, answer))
    # GPT-NeoX computes all of it in the model's dtype: others cast their norms to float32.
    config = AutoConfig.for_model(
        "gpt_neox",
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        # Norms of nearly constant states have no end to their slope: no minimum was ever reached.
        layer_norm_eps=1.0,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).double().eval()
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.data = torch.randn(parameter.shape).double() / WIDTH**0.5
        # Frozen, and so large that tokens can be told apart and predicted with confidence.
        for parameter in (*model.get_input_embeddings().parameters(), model.lm_head.weight):
            parameter.data *= WIDTH**0.5
    problem = Problem(model, examples, penalty, seed, first_layer)
    _approach(problem)
    count = sum(weight.numel() for weight in _trained(problem))
    _settle(problem, range(rows), torch.eye(count).double(), "all rows")
    return problem


def measure_truth(problem: Problem, alone: int = 32, groups: int = 8, group_size: int = 8) -> Truth:
    """Leaves rows out alone, then some groups, each time from the weights trained on all."""
    rows = len(problem.examples)
    generator = torch.Generator().manual_seed(problem.seed + 1)
    before = _losses(problem)
    start = [parameter.detach().clone() for parameter in _trained(problem)]
    preconditioner = _preconditioner(problem)

    def changed(left_out: Sequence[int]) -> list[float]:
        kept = [row for row in range(rows) if row not in left_out]
        _settle(problem, kept, preconditioner, "left out")
        change = (_losses(problem) - before).tolist()
        for parameter, value in zip(_trained(problem), start, strict=True):
            parameter.data.copy_(value)
        return change

    # Rows come in no order, so that the first are any.
    own = {row: changed([row])[row] for row in range(min(alone, rows))}
    chosen = [
        sorted(torch.randperm(rows, generator=generator)[:group_size].tolist()) for _ in range(groups)
    ]
    return Truth(own, [(group, changed(group)) for group in chosen])


def predict(
    problem: Problem, kind: str, forget: Sequence[int], damping: float | None = None
) -> LeaveOut:
    """What the library says of leaving out `forget`, damped by the penalty unless told otherwise."""
    layout = find_layout(problem.model)
    maps = linear_maps(problem.model, layout, problem.first_layer, layout.count - 1)
    kept = [row for row in range(len(problem.examples)) if row not in forget]
    return leave_out(
        RowGradients(problem.model, maps, pad_id=0, batch_size=8),
        [[problem.examples[row]] for row in forget],
        [[problem.examples[row]] for row in kept],
        kind,  # type: ignore[arg-type]
        problem.penalty if damping is None else damping,
        "absolute" if damping is None else "mean-fisher",
    )


def correlations(
    problem: Problem, truth: Truth, kind: str, damping: float | None = None
) -> tuple[float, float]:
    """Spearman's rank correlation with the truth: of self-influence, and of collateral."""
    own = predict(problem, kind, list(truth.own), damping).self_influence
    others = [predict(problem, kind, group, damping).collateral for group, _ in truth.groups]
    return agreement(truth, own, others)


def exact(problem: Problem, truth: Truth) -> tuple[float, float]:
    """The same with the Hessian of the objective as the curvature."""
    gradients = torch.stack(
        [
            _flat(torch.autograd.grad(loss, _trained(problem), retain_graph=True))
            for loss in _token_losses(problem).mean(1)
        ]
    )
    turned = gradients @ _preconditioner(problem)
    own = turned[list(truth.own)].square().sum(1).tolist()
    others = []
    for group, _ in truth.groups:
        kept = [row for row in range(len(turned)) if row not in group]
        others.append((turned[kept] @ turned[list(group)].sum(0)).tolist())
    return agreement(truth, own, others)


def agreement(
    truth: Truth, own: Sequence[float], others: Sequence[Sequence[float]]
) -> tuple[float, float]:
    """Spearman's rank correlations of predictions with the truth: self, and mean over the groups."""
    found = []
    for (group, change), rises in zip(truth.groups, others, strict=True):
        kept = [value for row, value in enumerate(change) if row not in group]
        found.append(float(spearmanr(rises, kept).statistic))
    return float(spearmanr(own, list(truth.own.values())).statistic), statistics.fmean(found)


def _flat(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([part.flatten() for part in parts])


def _trained(problem: Problem) -> list[torch.nn.Parameter]:
    layout = find_layout(problem.model)
    maps = linear_maps(problem.model, layout, problem.first_layer, layout.count - 1)
    return [parameter for module in maps.values() for parameter in module.parameters()]


def _batch(problem: Problem) -> Batch:
    return collate(problem.examples, range(len(problem.examples)), 0)


def _token_losses(problem: Problem) -> torch.Tensor:
    """(rows, tokens - 1), float64."""
    ids = _batch(problem).input_ids
    with sdpa_kernel(SDPBackend.MATH):  # which can be differentiated twice
        logits = problem.model(input_ids=ids, use_cache=False).logits[:, :-1]
    losses = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.view(len(ids), -1)


@torch.no_grad()
def _losses(problem: Problem) -> torch.Tensor:
    return _token_losses(problem).mean(1)


def _objective(problem: Problem, kept: Sequence[int]) -> torch.Tensor:
    """Sum over the kept rows' tokens / all tokens + penalty / 2 * |weights|^2."""
    losses = _token_losses(problem)
    squares = torch.stack([weight.square().sum() for weight in _trained(problem)]).sum()
    return losses[list(kept)].sum() / losses.numel() + problem.penalty / 2 * squares


def _gradient(problem: Problem, kept: Sequence[int], *, graph: bool = False) -> torch.Tensor:
    """Of the objective, (parameters,)."""
    parts = torch.autograd.grad(_objective(problem, kept), _trained(problem), create_graph=graph)
    return _flat(parts)


def _preconditioner(problem: Problem) -> torch.Tensor:
    """P with P P^T the inverse of the Hessian on all rows, eigenvalues by size: (parameters, same)."""
    gradient = _gradient(problem, range(len(problem.examples)), graph=True)
    rows = []
    for vectors in torch.eye(len(gradient), dtype=gradient.dtype).split(64):
        parts = torch.autograd.grad(
            gradient, _trained(problem), vectors, is_grads_batched=True, retain_graph=True
        )
        rows.append(torch.cat([part.flatten(1) for part in parts], dim=1))
    hessian = torch.cat(rows)
    values, axes = torch.linalg.eigh((hessian + hessian.T) / 2)
    return axes / values.abs().clamp(min=0.1 * problem.penalty).sqrt()


def _approach(problem: Problem) -> None:
    """Near the minimum on all rows, by Adam with a rate that falls to 0."""
    optimizer = torch.optim.Adam(_trained(problem), lr=_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
    for _ in range(_STEPS):
        optimizer.zero_grad()
        _objective(problem, range(len(problem.examples))).backward()
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()


def _settle(problem: Problem, kept: Sequence[int], turn: torch.Tensor, what: str) -> None:
    """To the minimum that is near, by L-BFGS along the preconditioner's axes.

    Raises SystemExit where none was reached.
    """
    weights = _trained(problem)
    start = _flat(weights).detach()
    sizes = [weight.numel() for weight in weights]

    def place(moved: Any) -> None:
        values = (start + turn @ torch.from_numpy(moved)).split(sizes)
        for weight, value in zip(weights, values, strict=True):
            weight.data.copy_(value.view_as(weight))

    def objective(moved: Any) -> tuple[float, Any]:
        place(moved)
        loss = _objective(problem, kept)
        parts = torch.autograd.grad(loss, weights)
        return float(loss.detach()), (turn.T @ _flat(parts)).numpy()

    most = _MOST_ITERATIONS[what]
    options = {"gtol": 1e-7, "ftol": 1e-15, "maxcor": 50, "maxiter": most, "maxfun": 2 * most}
    found = minimize(
        objective, start.new_zeros(len(start)).numpy(), jac=True, method="L-BFGS-B", options=options
    )
    place(found.x)
    norm = float(_gradient(problem, kept).norm())
    if not norm < _FLAT:
        raise SystemExit(f"{what}: the gradient's norm is {norm:.1e} after {found.nit} iterations")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=160)
    parser.add_argument("--penalty", type=float, default=1e-2)
    parser.add_argument("--dampings", type=float, nargs="*", default=[])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="write the table here as markdown")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings = [(kind, damping) for kind in KINDS for damping in (None, *arguments.dampings)]
    settings.insert(0, ("exact", None))
    found: dict[Any, list[tuple[float, float]]] = {setting: [] for setting in settings}
    for seed in range(arguments.seeds):
        problem = make_problem(seed, arguments.rows, arguments.penalty)
        truth = measure_truth(problem)
        for setting in settings:
            if setting[0] == "exact":
                found[setting].append(exact(problem, truth))
            else:
                found[setting].append(correlations(problem, truth, *setting))
        print(f"seed {seed} done", file=sys.stderr, flush=True)
    lines = []
    for (kind, damping), values in found.items():
        unit = "penalty" if damping is None else f"{damping:g} x mean"
        for name, column in zip(("self", "collateral"), zip(*values, strict=True), strict=True):
            cells = [f"{value:.2f}" for value in column]
            lines.append([kind, unit, name, f"{statistics.fmean(column):.2f}", *cells])
    header = ["curvature", "damping", "what", "mean"]
    text = markdown([*header, *(f"seed {seed}" for seed in range(arguments.seeds))], lines)
    print(text)
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
