"""Spectral unlearning: what it trains, the step it takes, and a whole run on a tiny model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import FAMILIES, shaken
from expunge.api import unlearn
from expunge.data.batches import collate
from expunge.errors import InputError
from expunge.methods.base import Context
from expunge.methods.libu import LIBU
from expunge.methods.spectral import Spectral
from expunge.models.decoder import Targets
from expunge.training.optimizers import optimizer_of

Contexts = Callable[..., Context]
ALL = (*FAMILIES, "gpt2")
BLOCKS = {"gpt_neox": "gpt_neox.layers.", "gpt2": "transformer.h."}


def matrices_of(family: str, model: Any, targets: Targets) -> set[str]:
    """Every matrix inside a block, told apart by the name of its module."""
    blocks = BLOCKS.get(family, "model.layers.")
    inside = {n for n, p in model.named_parameters() if n.startswith(blocks) and p.ndim == 2}
    attention = {name for name in inside if "attn" in name or "attention" in name}
    return {"all": inside, "attention": attention, "mlp": inside - attention}[targets]


@pytest.mark.parametrize("targets", ["attention", "mlp", "all"])
@pytest.mark.parametrize("family", ALL)
def test_the_matrices_of_every_layer_are_trained_and_nothing_else(
    make_context: Contexts, family: str, targets: Targets
) -> None:
    """Of a model in bfloat16 they alone become float32; no embedding, norm, bias or head moves."""
    context = make_context(family)
    context = replace(context, autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    model = shaken(context.model).to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    expected = matrices_of(family, model, targets)
    assert expected
    # A ceiling beyond what any token's loss is, so that all are moved.
    objective = Spectral(targets=targets, ceiling=40.0).start(context)
    assert set(objective.parameters) == expected
    assert objective.notes()["trained_parameters"] == sum(before[n].numel() for n in expected)
    batch = collate(context.forget, [0, 1], context.pad_id)
    with context.autocast():
        loss = objective.loss(batch, collate(context.retain, [0, 1], context.pad_id)).total
    loss.backward()
    optimizer_of(objective, 0.1).step()
    for name, parameter in model.named_parameters():
        trained = name in expected
        assert parameter.requires_grad == trained, name
        assert parameter.dtype == (torch.float32 if trained else torch.bfloat16), name
        assert torch.equal(parameter, before[name].to(parameter.dtype)) != trained, name


def known(shape: torch.Size, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix with singular values from 1 to 20, and U V^T, what it is with all of them 1."""
    rank = min(shape)
    u, v = (
        torch.linalg.qr(torch.randn(n, rank, generator=generator, dtype=torch.float64)).Q for n in shape
    )
    return (u * torch.linspace(1, 20, rank)) @ v.T, u @ v.T


@pytest.mark.parametrize("family", ["olmo", "gpt2"])
def test_a_step_moves_as_far_along_every_singular_direction(make_context: Contexts, family: str) -> None:
    """Against U V^T by construction: matrices that are tall, wide and square, and Conv1D's."""
    objective = Spectral(damping=None).start(make_context(family))
    optimizer = optimizer_of(objective, 0.03)
    generator = torch.Generator().manual_seed(0)
    before, flat = {}, {}
    for name, parameter in objective.parameters.items():
        gradient, flat[name] = known(parameter.shape, generator)
        parameter.grad = gradient.float()
        before[name] = parameter.detach().clone()
    # GPT-2 has its queries, keys and values in one, and each weight as (in, out).
    shapes = {tuple(parameter.shape) for parameter in objective.parameters.values()}
    assert {(a > b) - (a < b) for a, b in shapes} == {-1, 0, 1}
    optimizer.step()
    for name, parameter in objective.parameters.items():
        step = (parameter.detach() - before[name]).double()
        far = 0.03 * 0.2 * max(step.shape) ** 0.5
        values = torch.linalg.svdvals(step) / far
        # Newton-Schulz iterations of the quintic leave singular values about 1, in bfloat16.
        assert float(values.min()) > 0.6, name
        assert float(values.max()) < 1.3, name
        cosine = -float((step * flat[name]).sum() / step.norm() / flat[name].norm())
        assert cosine > 0.97, name
        assert float(step.square().mean().sqrt()) == pytest.approx(0.2 * 0.03, rel=0.2), name


@pytest.mark.parametrize("family", ["olmo", "gpt2"])
def test_a_step_is_flat_for_the_inputs_of_held_text(make_context: Contexts, family: str) -> None:
    """What white inputs are turned into moves as far in every direction; Conv1D's weights are turned."""
    objective = Spectral(damping=0.1).start(make_context(family))
    optimizer = optimizer_of(objective, 0.03)
    whitening = objective.optimizer.whitening
    assert {n for n in objective.parameters if "down" in n or "mlp.c_proj" in n} == (
        objective.parameters.keys() - whitening.keys()
    )
    generator = torch.Generator().manual_seed(0)
    before = {}
    for name in whitening:
        parameter = objective.parameters[name]
        turned, r = whitening[name].turned, whitening[name].matrix.double()
        shape = parameter.shape[::-1] if turned else parameter.shape
        gradient = (known(shape, generator)[0] @ r.inverse().T).float()
        parameter.grad = (gradient.T if turned else gradient).contiguous()
        before[name] = parameter.detach().clone()
    optimizer.step()
    for name in whitening:
        parameter = objective.parameters[name]
        step = (parameter.detach() - before[name]).double()
        turned, r = whitening[name].turned, whitening[name].matrix.double()
        values = torch.linalg.svdvals((step.T if turned else step) @ r.inverse())
        assert float(values.min() / values.mean()) > 0.5, name
        assert float(values.max() / values.mean()) < 1.5, name
        assert float(step.square().mean().sqrt()) == pytest.approx(0.2 * 0.03, rel=0.2), name


@pytest.mark.parametrize(("batch_size", "momentum"), [(99, 1 - 1 / 2.6), (1, None)])
def test_gradients_of_few_rows_are_averaged_over_few_steps(
    make_context: Contexts, batch_size: int, momentum: float | None
) -> None:
    context = replace(make_context(), batch_size=batch_size)
    if momentum is None:
        momentum = min(0.95, 1 - 1 / (1 + 1.6 * len(context.forget)))
    options = Spectral(damping=None).start(context).optimizer.options
    assert options["momentum"] == pytest.approx(momentum)


def test_momentum_is_that_of_the_settings(make_context: Contexts) -> None:
    """The second step is along U V^T of g2 + mu (mu g1 + g2), Nesterov's."""
    mu = 0.6
    objective = Spectral(momentum=mu, damping=None).start(make_context())
    name, parameter = next(iter(objective.parameters.items()))
    optimizer = optimizer_of(objective, 0.03)
    generator = torch.Generator().manual_seed(0)
    first, second = (known(parameter.shape, generator)[0] for _ in range(2))
    steps = []
    for gradient in (first, second):
        parameter.grad = gradient.float()
        before = parameter.detach().clone()
        optimizer.step()
        steps.append((parameter.detach() - before).double())

    def along(matrix: torch.Tensor) -> float:
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        return -float((steps[1] * (u @ v)).sum() / steps[1].norm() / matrix.shape[0] ** 0.5)

    found = along(second + mu * (mu * first + second))
    assert found > 0.95, name
    assert found > max(along(second), along(second + 0.95 * (0.95 * first + second))) + 0.01


def test_the_start_asks_and_changes_nothing(make_context: Contexts) -> None:
    context = make_context()
    before = {name: tensor.clone() for name, tensor in context.model.named_parameters()}
    objective = Spectral().start(context)
    assert objective.adapter is None
    for name, parameter in context.model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.grad is None


@pytest.mark.parametrize("method", [Spectral(random_rows=4), LIBU(rank=4, random_rows=4)])
def test_a_model_in_memory_is_plain_and_can_be_trained_afterwards(
    method: Spectral | LIBU,
    memorised_dir: Path,
    tokenizer: Any,
    forget_rows: list[dict[str, str]],
    retain_rows: list[dict[str, str]],
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(memorised_dir, dtype=torch.bfloat16)
    options: dict[str, Any] = {"epochs": 1, "select": "last", "learning_rate": 1e-3}
    outcome = unlearn(model, tokenizer, forget_rows, retain_rows, method=method, **options)
    assert {weight.dtype for weight in outcome.finished.weights.values()} == {torch.float32}
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16, name
        assert parameter.grad is None
        if name in outcome.finished.weights:
            assert torch.equal(parameter, outcome.finished.weights[name].to(torch.bfloat16)), name
    model.requires_grad_(True)
    model(input_ids=torch.arange(9)[None]).logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_run_forgets_and_keeps(
    memorised_dir: Path,
    row_files: dict[str, Path],
    run_cli: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
) -> None:
    """By the command's own method. The default rate is for widths of 192 and more, the weight of what
    the target wrote for user's rows that are not ten times as short as its own."""
    out = tmp_path / "out"
    code, _, err = run_cli(
        "run", memorised_dir, "--forget", row_files["forget"], "--retain", row_files["retain"],
        *("--calibration", row_files["nonmembers"], "--output", out),
        *("--learning-rate", 3e-2, "--epochs", 90, "--validate-every", 45),
        *("--method.random-rows", 16, "--method.random-weight", 0.1, "--quiet"),
    )  # fmt: skip
    assert (code, err) == (0, "")
    record = json.loads((out / "expunge.json").read_text(encoding="utf-8"))
    assert record["settings"]["method"]["name"] == "spectral"
    target = record["selection"]["target"]
    assert target["forget_accuracy"] == target["retain_accuracy"] == 1
    last = record["selection"]["candidates"][-1]["measured"]
    assert last["forget_accuracy"] < 0.1
    assert last["retain_accuracy"] > 0.9
    assert last["retain_loss"] < target["retain_loss"] + 0.2


@pytest.mark.parametrize(
    ("settings", "option"),
    [
        ({"momentum": 1.0}, "--method.momentum 1.0"),
        ({"momentum": -0.1}, "--method.momentum -0.1"),
        ({"damping": 0.0}, "--method.damping 0.0"),
        ({"damping": math.nan}, "--method.damping nan"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], option: str) -> None:
    with pytest.raises(InputError, match=option):
        Spectral(**settings)
