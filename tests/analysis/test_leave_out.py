"""Self-influence and collateral against dense references."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from expunge.analysis.leave_out import CurvatureKind, LeaveOut, leave_out
from expunge.analysis.row_gradients import with_ones
from expunge.errors import RunError
from row_setting import Setting, make_setting

FORGET = 2


@pytest.fixture
def setting() -> Setting:
    return make_setting()


def found(setting: Setting, batch_size: int = 3, **options: Any) -> LeaveOut:
    passes = setting.passes(batch_size)
    rows = setting.rows
    return leave_out(passes, rows[:FORGET], rows[FORGET:], **options)


def flat(setting: Setting) -> tuple[torch.Tensor, list[int]]:
    """Every row's gradient as one vector, float64: (rows, parameters), and their counted tokens."""
    gradients = [
        torch.cat([g.flatten() for g in setting.gradient(row).values()]).double() for row in setting.rows
    ]
    return torch.stack(gradients), [len(row[0]) - 1 for row in setting.rows]


@pytest.mark.parametrize(("damping", "unit"), [(1.0, "mean-fisher"), (0.01, "absolute")])
def test_the_diagonal_predictions_are_the_formulas(setting: Setting, damping: float, unit: str) -> None:
    gradients, counts = flat(setting)
    total = sum(counts)
    fisher = gradients.square().sum(0) / total
    added = damping * float(fisher.mean()) if unit == "mean-fisher" else damping
    result = found(setting, damping=damping, unit=unit)
    assert result.tokens == total
    assert result.mean_fisher == pytest.approx(float(fisher.mean()), rel=1e-4)
    assert result.damping == pytest.approx(added, rel=1e-4)
    inverse = 1 / (fisher + added)
    for place in range(FORGET):
        own = float((gradients[place] ** 2 * inverse).sum()) / total / counts[place]
        assert result.self_influence[place] == pytest.approx(own, rel=1e-3)
    step = inverse * gradients[:FORGET].sum(0) / total
    for place in range(FORGET, len(counts)):
        rise = float(gradients[place] @ step) / counts[place]
        assert result.collateral[place - FORGET] == pytest.approx(rise, rel=1e-3, abs=1e-7)


def test_ekfac_is_a_curvature_of_the_same_trace(setting: Setting) -> None:
    """Both with the data's labels: turning the axes leaves the trace as it is."""
    diagonal, turned = found(setting), found(setting, kind="ekfac")
    assert turned.mean_fisher == pytest.approx(diagonal.mean_fisher, rel=1e-4)
    assert turned.tokens == diagonal.tokens
    assert turned.self_influence != pytest.approx(diagonal.self_influence, rel=1e-2)
    assert [known.loss for known in turned.forget] == [known.loss for known in diagonal.forget]


@pytest.mark.parametrize("family", ["olmo", "qwen2"])
def test_the_ekfac_predictions_are_the_formulas(family: str) -> None:
    """Against dense matrices in float64; qwen2's maps have biases, which are columns of their own."""
    setting = make_setting(family)
    result = found(setting, kind="ekfac", unit="absolute", damping=0.01)
    gradients = [{name: g.detach() for name, g in setting.gradient(row).items()} for row in setting.rows]
    counts = [len(row[0]) - 1 for row in setting.rows]
    total = sum(counts)
    own, rises = [0.0] * FORGET, [0.0] * (len(counts) - FORGET)
    for name, (inputs, outputs) in covariances(setting).items():
        axes = [torch.linalg.eigh(each).eigenvectors for each in (outputs, inputs)]
        turned = [axes[0].T @ gradient[name].double() @ axes[1] for gradient in gradients]
        inverse = 1 / (torch.stack(turned).square().sum(0) / total + 0.01)
        step = sum(turned[:FORGET], torch.zeros_like(inverse)) * inverse / total
        for place, each in enumerate(turned):
            if place < FORGET:
                own[place] += float((each**2 * inverse).sum()) / total / counts[place]
            else:
                rises[place - FORGET] += float((each * step).sum()) / counts[place]
    assert result.self_influence == pytest.approx(own, rel=1e-3)
    assert result.collateral == pytest.approx(rises, rel=1e-3, abs=1e-6)


def covariances(setting: Setting) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Of each map's inputs and output gradients over all tokens, float64."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: object, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            output.retain_grad()
            seen[name] = (args[0], output)

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in setting.maps.items()]
    for module in setting.maps.values():
        module.get_parameter("weight").requires_grad_(True)
    sums: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for row in setting.rows:
        setting.loss(row).backward()
        for name, module in setting.maps.items():
            inputs, output = seen[name]
            assert output.grad is not None
            x, g = with_ones(inputs.detach(), module)[0].double(), output.grad[0].double()
            old = sums.get(name, (torch.zeros(()), torch.zeros(())))
            sums[name] = (old[0] + x.T @ x, old[1] + g.T @ g)
    for handle in handles:
        handle.remove()
    return sums


def test_a_row_that_repeats_a_forget_row_is_hurt_most(setting: Setting) -> None:
    rows = [*setting.rows[:3], setting.rows[0], *setting.rows[3:]]
    result = leave_out(setting.passes(), rows[:FORGET], rows[FORGET:])
    assert max(result.collateral) == result.collateral[1] > 0


@pytest.mark.parametrize("kind", ["diagonal", "ekfac", "cg"])
def test_twice_the_same_and_whatever_the_batch_size(setting: Setting, kind: str) -> None:
    first, again = (found(setting, kind=kind) for _ in range(2))
    assert first == again
    small = found(setting, 1, kind=kind)
    if kind == "diagonal":
        assert small.self_influence == pytest.approx(first.self_influence, rel=1e-3)
        assert small.collateral == pytest.approx(first.collateral, rel=1e-3, abs=1e-6)
    assert small.mean_fisher == pytest.approx(first.mean_fisher, rel=1e-3)


def test_without_a_retain_set_there_is_self_influence_alone(setting: Setting) -> None:
    kinds: tuple[CurvatureKind, ...] = ("diagonal", "cg")
    for kind in kinds:
        result = leave_out(setting.passes(), setting.rows, [], kind)
        assert len(result.self_influence) == len(setting.rows)
        assert list(result.collateral) == []
        assert min(result.self_influence) > 0


def test_a_model_without_curvature_is_refused(setting: Setting) -> None:
    for parameter in setting.model.parameters():
        parameter.data.zero_()
    with pytest.raises(RunError, match="damping"):
        found(setting)
