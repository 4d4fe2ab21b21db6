"""Conjugate gradients and Gauss-Newton products, against dense matrices in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from expunge.analysis import leave_out as module
from expunge.analysis.leave_out import LeaveOut, leave_out
from expunge.analysis.row_gradients import output_product
from expunge.errors import RunError
from expunge.maths.conjugate_gradients import Blocks, conjugate_gradients
from expunge.models.decoder import is_turned
from row_setting import Setting, make_setting

FORGET = 1
SIZES = {"a": (3, 4), "b": (2, 5)}


def cut(vector: torch.Tensor) -> dict[str, torch.Tensor]:
    parts = vector.split([12, 10])
    return {name: part.view(shape) for (name, shape), part in zip(SIZES.items(), parts, strict=True)}


def joined(blocks: Blocks) -> torch.Tensor:
    return torch.cat([block.flatten() for block in blocks.values()])


def system(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A symmetric matrix with these eigenvalues, and a right side."""
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(22, 22, generator=generator, dtype=torch.float64))[0]
    return turn @ torch.diag(values) @ turn.T, torch.randn(22, generator=generator, dtype=torch.float64)


def solve(matrix: torch.Tensor, right: torch.Tensor, most: int = 100, **options: Any) -> Any:
    scale = options.get("scale", torch.ones(22, dtype=torch.float64))
    return conjugate_gradients(
        lambda blocks: cut(matrix @ joined(blocks)),
        cut(right),
        lambda blocks: cut(joined(blocks) / scale),
        options.get("tolerance", 1e-10),
        most,
    )


def test_it_solves_and_the_error_falls_with_each_iteration() -> None:
    matrix, right = system(torch.logspace(-2, 2, 22, dtype=torch.float64))
    expected = torch.linalg.solve(matrix, right)
    found = solve(matrix, right)
    torch.testing.assert_close(joined(found.solution), expected, rtol=1e-6, atol=1e-8)
    assert found.residuals[0] == 1.0
    assert found.residuals[-1] <= 1e-10 < found.residuals[-2]
    errors = []
    for most in range(15):
        part = solve(matrix, right, most)
        assert len(part.residuals) == most + 1
        wrong = joined(part.solution) - expected
        errors.append(float(wrong @ matrix @ wrong))
        told = float((right - matrix @ joined(part.solution)).norm() / right.norm())
        assert part.residuals[-1] == pytest.approx(told, rel=1e-6)
    assert errors == sorted(errors, reverse=True)
    assert len(set(errors)) == len(errors)


def test_it_ends_after_as_many_iterations_as_there_are_eigenvalues() -> None:
    values = torch.tensor([1.0, 3.0, 10.0] * 7 + [3.0], dtype=torch.float64)
    assert len(solve(*system(values)).residuals) - 1 == 3
    # By the inverse itself one is enough.
    matrix = torch.diag(torch.logspace(-3, 3, 22, dtype=torch.float64))
    found = solve(matrix, system(values)[1], scale=matrix.diagonal())
    assert len(found.residuals) - 1 == 1


def test_nothing_to_solve_and_a_curvature_that_bends_down() -> None:
    matrix, right = system(torch.ones(22, dtype=torch.float64))
    assert solve(matrix, 0 * right).residuals == [0.0]
    with pytest.raises(RunError, match="--damping higher"):
        solve(-matrix, right)


def test_the_product_at_the_output_is_that_of_the_dense_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, tangent = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    for line in range(5):
        p = logits[line].softmax(-1)
        expected = (torch.diag(p) - torch.outer(p, p)) @ tangent[line]
        torch.testing.assert_close(output_product(logits, tangent)[line], expected)


def setting_of(family: str = "olmo") -> Setting:
    """With few maps, one of each layer, so that a dense matrix is small."""
    setting = make_setting(family, lengths=(5, 4, 6))
    names = list(setting.maps)
    return replace(setting, maps={name: setting.maps[name] for name in (names[0], names[-1])})


def jacobian(setting: Setting, row: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the logits of a row's counted tokens: (tokens, vocabulary, parameters), with their logits."""
    (window,) = row
    for parameter in setting.model.parameters():
        parameter.requires_grad_(True)
    weights = [weight for name in setting.maps for weight in setting.weights(name)]
    with sdpa_kernel(SDPBackend.MATH):
        logits = setting.model(input_ids=torch.tensor([window.input_ids])).logits[0]
        places = [place - 1 for place in range(1, len(window)) if window.token_mask[place]]
        lines = []
        for place in places:
            for token in range(logits.shape[1]):
                parts = torch.autograd.grad(logits[place, token], weights, retain_graph=True)
                lines.append(flat(setting, parts))
    found = torch.stack(lines).double()
    return found.view(len(places), -1, found.shape[1]), logits[places].detach().double()


def flat(setting: Setting, parts: Any) -> torch.Tensor:
    """Gradients of the maps' weights as one vector, in the order of (out, in) blocks."""
    found, rest = [], iter(parts)
    for name, linear in setting.maps.items():
        weight, *bias = (next(rest) for _ in setting.weights(name))
        weight = weight.T if is_turned(linear) else weight
        found.append(torch.cat([weight, *(b[:, None] for b in bias)], dim=1).flatten())
    return torch.cat(found)


def gauss_newton(setting: Setting, rows: Any) -> torch.Tensor:
    """Summed over tokens: (parameters, parameters)."""
    total = torch.zeros(())
    for row in rows:
        for jacobians, logits in zip(*jacobian(setting, row), strict=True):
            p = logits.softmax(-1)
            total = total + jacobians.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobians
    return total


def blocks_like(setting: Setting, vector: torch.Tensor) -> dict[str, torch.Tensor]:
    from expunge.analysis.row_gradients import blocks_of_zeros

    zeros = blocks_of_zeros(setting.maps)
    parts = vector.split([block.numel() for block in zeros.values()])
    return {n: part.view(z.shape) for (n, z), part in zip(zeros.items(), parts, strict=True)}


@pytest.mark.parametrize("family", ["olmo", "qwen2", "gpt2"])
def test_products_are_those_of_the_dense_matrix_whatever_the_batch(family: str) -> None:
    """qwen2's maps have biases, gpt2's are turned as well."""
    setting = setting_of(family)
    dense = gauss_newton(setting, setting.rows)
    generator = torch.Generator().manual_seed(1)
    for batch_size in (1, 3):
        vector = torch.randn(len(dense), generator=generator)
        passes = setting.passes(batch_size)
        found = joined(passes.gauss_newton(setting.rows, blocks_like(setting, vector)))
        expected = dense @ vector.double()
        # float32 against float64.
        torch.testing.assert_close(
            found.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())
        )
    assert all(not module._forward_hooks for module in setting.model.modules())


def found_by(setting: Setting, **options: Any) -> LeaveOut:
    rows = setting.rows
    return leave_out(setting.passes(), rows[:FORGET], rows[FORGET:], **options)


def test_the_collateral_is_that_of_a_dense_solve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOLERANCE", 1e-6)
    setting = setting_of()
    result = found_by(setting, kind="cg", damping=0.5, unit="absolute")
    total, counts = result.tokens, [len(row[0]) - 1 for row in setting.rows]
    dense = gauss_newton(setting, setting.rows[FORGET:]) / total
    gradients = torch.stack([joined(setting.gradient(row)).detach().double() for row in setting.rows])
    step = torch.linalg.solve(dense + 0.5 * torch.eye(len(dense)), gradients[:FORGET].sum(0) / total)
    expected = [float(g @ step) / n for g, n in zip(gradients, counts, strict=True)][FORGET:]
    assert result.collateral == pytest.approx(expected, rel=1e-2, abs=1e-6)
    assert result.residuals[0] == 1.0
    assert result.residuals[-1] <= 1e-6
    # One system serves the forget set; what each row owes to itself is EK-FAC's.
    basis = found_by(setting, kind="ekfac", damping=0.5, unit="absolute")
    assert result.self_influence == pytest.approx(basis.self_influence, rel=1e-4)
    assert result.collateral != pytest.approx(basis.collateral, rel=1e-2)
    assert not basis.residuals


def test_much_damping_leaves_the_gradient_over_the_damping() -> None:
    setting = setting_of()
    result = found_by(setting, kind="cg", damping=1e6, unit="absolute")
    gradients = torch.stack([joined(setting.gradient(row)).detach() for row in setting.rows])
    products = gradients[FORGET:] @ gradients[:FORGET].sum(0)
    for place, product in enumerate(products.tolist(), FORGET):
        expected = product / (1e6 * result.tokens * (len(setting.rows[place][0]) - 1))
        assert result.collateral[place - FORGET] == pytest.approx(expected, rel=1e-3)
    assert len(result.residuals) == 2
