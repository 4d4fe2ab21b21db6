"""The formulas of the layer score against slow references, at their limits, and by their properties."""

from __future__ import annotations

import math

import pytest
import torch

from expunge.analysis.layer_scores import combined, separate, share


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_share_is_the_summed_way_from_floor_to_full() -> None:
    values = torch.tensor([[-4.0, -1.0], [-2.0, -1.5]])
    floor, full = torch.tensor([-6.0, -2.0]), torch.tensor([-1.0, -1.0])
    # Rows add up before they are divided: (2 + 0) / (5 + 1) and (5 + 0.5) / 6.
    assert share(values, floor, full).tolist() == pytest.approx([2 / 6, 5.5 / 6])  # type: ignore[union-attr]


def test_a_share_is_0_at_the_floor_1_at_the_full_and_cut_beyond() -> None:
    floor, full = drawn(5), drawn(5, seed=1) + 4
    found = share(torch.stack([floor, full, floor - 1, full + 1], dim=1), floor, full)
    assert found is not None
    assert found.tolist() == pytest.approx([0, 1, 0, 1], abs=1e-7)


def test_there_is_no_share_where_nothing_is_known() -> None:
    floor = torch.tensor([-1.0, -2.0])
    assert share(floor[:, None], floor, floor) is None
    assert share(floor[:, None], floor, floor - 1) is None


def slow_separate(forget: torch.Tensor, retain: torch.Tensor) -> float:
    centre = [sum(row[i] for row in retain.tolist()) / len(retain) for i in range(forget.shape[1])]

    def cosine(a: list[float], b: list[float]) -> float:
        x = [p - c for p, c in zip(a, centre, strict=True)]
        y = [p - c for p, c in zip(b, centre, strict=True)]
        dot = sum(p * q for p, q in zip(x, y, strict=True))
        return dot / math.sqrt(sum(p * p for p in x)) / math.sqrt(sum(q * q for q in y))

    nearest = [max(cosine(a, b) for b in retain.tolist()) for a in forget.tolist()]
    return min(1.0, max(0.0, 1 - sum(nearest) / len(nearest)))


def test_separation_against_a_slow_reference() -> None:
    forget, retain = drawn(5, 7) + 3, drawn(9, 7, seed=1) + 3
    assert separate(forget, retain) == pytest.approx(slow_separate(forget, retain), abs=1e-6)


def test_separation_is_0_for_rows_that_are_also_kept_and_1_for_opposite_ones() -> None:
    retain = drawn(6, 8)
    assert separate(retain[:3], retain) == pytest.approx(0, abs=1e-9)
    one_side = torch.tensor([[1.0, 0.0], [1.0, 0.2], [1.0, -0.2]])
    # About their mean they are (0, 0), (0, .2), (0, -.2), and the forget one is at a right angle.
    assert separate(torch.tensor([[-3.0, 0.0]]), one_side) == pytest.approx(1)


def test_separation_does_not_see_a_rotation_a_shift_or_a_scale() -> None:
    forget, retain = drawn(5, 6).double(), drawn(9, 6, seed=1).double()
    rotation = torch.linalg.qr(drawn(6, 6, seed=2).double()).Q
    moved = [side @ rotation * 3 + 5 for side in (forget, retain)]
    assert separate(*moved) == pytest.approx(separate(forget, retain), abs=1e-9)


def test_a_row_to_keep_more_never_separates_more() -> None:
    forget, retain = drawn(5, 6), drawn(9, 6, seed=1)
    retain = retain - retain.mean(0)
    more = torch.cat([retain, forget[:1], -forget[:1]])  # the mean stays 0
    assert separate(forget, more) < separate(forget, retain)


def test_the_score_is_the_geometric_mean() -> None:
    assert combined([0.25, 1.0]) == pytest.approx(0.5)
    assert combined([0.3]) == pytest.approx(0.3)
    assert combined([1.0, 1.0, 0.0]) == 0
    shares = [0.9, 0.5, 0.7]
    assert min(shares) < combined(shares) < max(shares)
    with pytest.raises(ValueError, match="no share"):
        combined([])
