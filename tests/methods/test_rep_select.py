"""RepSelect: the collapse against a whole SVD on both sides, its limits, and a run that goes one way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import random_examples, refusal, tiny_model
from expunge.data.batches import collate
from expunge.errors import RunError
from expunge.maths.numerics import token_log_probs
from expunge.methods.base import Context
from expunge.methods.rep_select import RepSelect, collapsed
from expunge.models.decoder import find_layout
from expunge.training.optimizers import optimizer_of

Contexts = Callable[..., Context]


def matrix(rows: int, columns: int, rank: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    if rank is None:
        return torch.randn(rows, columns, generator=generator)
    left = torch.randn(rows, rank, generator=generator)
    return left @ torch.randn(rank, columns, generator=generator)


def both_sides(gradient: torch.Tensor, count: int) -> torch.Tensor:
    """By the paper: the right side's components divided by S / s_k, then the left side's."""
    u, s, vt = torch.linalg.svd(gradient.double())
    result = gradient.double()
    for i in range(count):
        result = result - (1 - s[count - 1] / s[i]) * torch.outer(result @ vt[i], vt[i])
    for i in range(count):
        result = result - (1 - s[count - 1] / s[i]) * torch.outer(u[:, i], u[:, i] @ result)
    return result


@pytest.mark.parametrize(("rows", "columns"), [(7, 12), (12, 7), (9, 9)])
@pytest.mark.parametrize("count", [1, 2, 5, 7])
def test_collapse_is_the_papers_on_both_sides(rows: int, columns: int, count: int) -> None:
    gradient = matrix(rows, columns)
    found, rank = collapsed(gradient, count)
    assert rank == min(rows, columns)
    assert found.dtype == torch.float32
    # Found in float64, rounded once.
    torch.testing.assert_close(found.double(), both_sides(gradient, count), rtol=1e-5, atol=1e-6)


def test_main_singular_values_become_the_square_of_the_last_of_them_over_each() -> None:
    gradient = matrix(8, 20)
    before = torch.linalg.svdvals(gradient.double())
    found, _ = collapsed(gradient, 3)
    expected = torch.cat([before[2] ** 2 / before[:3], before[3:]]).sort(descending=True).values
    torch.testing.assert_close(torch.linalg.svdvals(found.double()), expected, rtol=1e-5, atol=1e-6)


def test_one_component_changes_nothing() -> None:
    gradient = matrix(6, 10)
    torch.testing.assert_close(collapsed(gradient, 1)[0], gradient)


def test_turned_axes_turn_the_result() -> None:
    gradient = matrix(6, 10)
    left, right = (torch.linalg.qr(matrix(size, size).double()).Q for size in (6, 10))
    found, _ = collapsed((left @ gradient.double() @ right).float(), 3)
    expected = left @ collapsed(gradient, 3)[0].double() @ right
    # The turned gradient is rounded to float32 before it is taken apart.
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [3, 4, 30])
def test_no_more_components_than_the_rank_are_weakened(count: int) -> None:
    """Else they would be weakened to a singular value of 0, and nothing would be left."""
    gradient = matrix(40, 64, rank=3)
    found, rank = collapsed(gradient, count)
    assert rank == 3
    torch.testing.assert_close(found.double(), both_sides(gradient, 3), rtol=1e-4, atol=1e-4)
    assert found.norm() > 0.1 * gradient.norm()


def test_no_gradient_stays_none() -> None:
    found, rank = collapsed(torch.zeros(4, 6), 2)
    assert (found.any().item(), rank) == (False, 0)


def likelihood_gradients(model: Any, context: Context, tokens: Any) -> dict[str, torch.Tensor]:
    """Of the mean log-probability of the counted tokens of all forget rows at once."""
    names = [f"{name}.weight" for name in find_layout(model).linears("mlp")]
    weights = [model.get_parameter(name).requires_grad_(True) for name in names]
    batch = collate(context.forget, range(len(context.forget)), context.pad_id)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    found = token_log_probs(logits, batch.input_ids)[batch.mask(tokens)[:, 1:]].mean()
    return dict(zip(names, torch.autograd.grad(found, weights), strict=True))


@pytest.mark.parametrize("family", ["olmo", "gpt2"])
@pytest.mark.parametrize("tokens", ["all", "answer"])
def test_without_an_adversary_the_direction_is_the_models_own(
    family: str, tokens: Any, make_context: Contexts, tokenizer: Any
) -> None:
    context = make_context(family)
    objective = RepSelect(tokens=tokens, adversary_rate=0.0, components=0.25).start(context)
    expected = likelihood_gradients(tiny_model(family, len(tokenizer)), context, tokens)
    assert expected.keys() == objective.state_tensors.keys()
    for name, gradient in expected.items():
        slow = both_sides(gradient, round(0.25 * min(gradient.shape)))
        difference = (objective.state_tensors[name] - slow).norm()
        assert difference < 1e-3 * slow.norm(), name  # float32 sums over other batches


def test_an_adversary_relearns_and_is_gone_before_the_first_step(
    make_context: Contexts, tokenizer: Any
) -> None:
    context = make_context()
    names = [name for name, _ in context.model.named_parameters()]
    objective, alone = (RepSelect(adversary_rate=rate).start(make_context()) for rate in (0.5, 0.0))
    started = RepSelect(adversary_rate=0.5).start(context)
    assert [name for name, _ in context.model.named_parameters()] == names
    plain = tiny_model("olmo", len(tokenizer))
    for name, weight in plain.named_parameters():
        assert torch.equal(context.model.get_parameter(name), weight), name
    trained = {n for n, p in context.model.named_parameters() if p.requires_grad}
    assert trained == set(started.parameters) == set(started.state_tensors)
    for name, way in started.state_tensors.items():
        assert torch.equal(way, objective.state_tensors[name])  # the same seed
    notes, others = (each.notes()["rep_select"] for each in (objective, alone))
    # It has learned some of the forget text, whose gradient is another then.
    assert notes["gradient_norm"] != pytest.approx(others["gradient_norm"], rel=1e-3)
    assert notes["direction_norm"] < notes["gradient_norm"]


@pytest.mark.parametrize("rows", [[0], [2, 1, 3]])
def test_a_step_is_the_rate_times_the_direction_whatever_the_rows(
    rows: list[int], make_context: Contexts
) -> None:
    context = make_context()
    objective = RepSelect().start(context)
    before = {name: p.detach().clone() for name, p in objective.parameters.items()}
    optimizer = optimizer_of(objective, 0.3)
    values = []
    for _ in range(2):
        terms = objective.loss(collate(context.forget, rows, context.pad_id), None)
        values.append(float(terms.total.detach()))
        terms.total.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in objective.parameters.items():
        expected = before[name] - 2 * 0.3 * objective.state_tensors[name]
        torch.testing.assert_close(parameter.detach(), expected)
    foreseen = 0.3 * objective.notes()["rep_select"]["direction_norm"] ** 2
    assert values[0] - values[1] == pytest.approx(foreseen, rel=1e-2)  # of two sums over all weights


def test_forget_text_becomes_less_likely_as_foreseen(make_context: Contexts) -> None:
    context = make_context()
    objective = RepSelect().start(context)
    batch = collate(context.forget, range(len(context.forget)), context.pad_id)
    losses = []
    for rate in (0.0, 1e-2):
        with torch.no_grad():
            for name, parameter in objective.parameters.items():
                parameter.sub_(rate * objective.state_tensors[name])
            losses.append(float(objective.cross_entropy(batch)))
    assert losses[1] > losses[0]


def test_a_resumed_start_makes_no_pass(make_context: Contexts) -> None:
    first = RepSelect().start(make_context())
    told = replace(make_context(), resumed=first.notes(), forget=())
    resumed = RepSelect().start(told)
    resumed.restore({}, dict(first.state_tensors))
    assert resumed.notes() == first.notes()
    for name, way in first.state_tensors.items():
        assert torch.equal(resumed.state_tensors[name], way)


def test_a_gradient_without_other_directions_is_refused_with_a_share_that_works(
    make_context: Contexts,
) -> None:
    few = random_examples([4], 100)
    with pytest.raises(RunError, match=r"--method\.components 0\.9: no direction") as error:
        RepSelect(tokens="all", components=0.9).start(replace(make_context(), forget=few))
    share = float(str(error.value).rsplit(" ", 1)[1])
    mended = RepSelect(tokens="all", components=share).start(replace(make_context(), forget=few))
    assert mended.notes()["rep_select"]["used_up"] == 0


def test_a_run_lowers_the_likelihood_of_forget_text_and_keeps_the_rest_of_the_model(
    memorised_dir: Path,
    row_files: dict[str, Path],
    run_cli: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
) -> None:
    import json

    from safetensors.torch import load_file

    rows = ("--forget", row_files["forget"], "--retain", row_files["retain"])
    options = ("--epochs", 2, "--batch-size", 4, "--learning-rate", 1, "--max-grad-norm", 1e-3)
    output = tmp_path / "out"
    code, _, err = run_cli(
        "run", memorised_dir, *rows, *options, "--output", output, "--method", "rep-select", "--quiet",
        "--select", "last",
    )  # fmt: skip
    assert code == 0, err
    before, after = (load_file(path / "model.safetensors") for path in (memorised_dir, output))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".mlp." in name}
    found = json.loads((output / "expunge.json").read_text())
    direction = found["method_notes"]["rep_select"]["direction_norm"]
    moved = torch.stack([(after[name] - before[name]).norm() for name in changed]).norm()
    steps = found["steps"] if "steps" in found else found["selection"]["chosen_step"]
    assert float(moved) == pytest.approx(steps * direction, rel=1e-3)  # nothing was clipped


def test_settings_that_no_run_can_take() -> None:
    for share in (0.0, 1.0, -0.1):
        assert "--method.components" in refusal(partial(RepSelect, components=share))
    assert "--method.adversary-rank" in refusal(lambda: RepSelect(adversary_rank=0))
    assert "--method.adversary-rate" in refusal(lambda: RepSelect(adversary_rate=-1.0))
    assert not RepSelect().needs_retain
    assert not RepSelect().has_adapter
