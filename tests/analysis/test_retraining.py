"""Predictions against the truth: a tiny model trained again without the rows."""

from __future__ import annotations

from typing import Any

import pytest

from conftest import load_benchmark


@pytest.fixture(scope="module")
def benchmark() -> Any:
    return load_benchmark("influence")


@pytest.mark.slow
def test_predictions_rank_rows_as_retraining_does(benchmark: Any) -> None:
    """With 160 rows and 32 of them left out: 0.74 to 0.80 (diagonal), 0.81 to 0.83 (EK-FAC).

    Chance has a standard deviation of 0.22 over 20 rows, of 0.07 over the rows of two groups.
    """
    problem = benchmark.make_problem(0)
    truth = benchmark.measure_truth(problem, alone=20, groups=2)
    assert min(truth.own.values()) > 0  # at a minimum, a row that is left out is only ever lost
    exact = benchmark.exact(problem, truth)
    diagonal, ekfac, whole = (
        benchmark.correlations(problem, truth, kind) for kind in ("diagonal", "ekfac", "cg")
    )
    assert exact[0] >= 0.9
    assert diagonal[0] >= 0.6
    assert ekfac[0] >= diagonal[0] - 0.05
    # Losses of other rows follow the parts of the curvature that both leave out: 0.58, 0.39, 0.20, 0.12.
    assert exact[1] > whole[1] > ekfac[1] > diagonal[1] > 0
    assert whole[0] == pytest.approx(ekfac[0])


def test_a_minimum_that_was_not_reached_ends_the_benchmark(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "_STEPS", 1)
    monkeypatch.setattr(benchmark, "_MOST_ITERATIONS", {"all rows": 3})
    with pytest.raises(SystemExit, match=r"gradient.s norm is .* after 3 iterations"):
        benchmark.make_problem(0, rows=8)
