"""Predictions against the truth: a tiny model trained again without the rows."""

from __future__ import annotations

import importlib.util
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "influence.py"


@pytest.fixture(scope="module")
def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("influence_benchmark", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look their own module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_predictions_rank_rows_as_retraining_does(benchmark: Any) -> None:
    """Means over two seeds were 0.51 and 0.50 with the diagonal, 0.54 and 0.60 with EK-FAC.

    Chance has a standard deviation of 0.13 over 2 x 32 rows, and of less over the groups' rows.
    """
    found: dict[str, list[tuple[float, float]]] = {"diagonal": [], "ekfac": []}
    for seed in range(2):
        problem = benchmark.make_problem(seed)
        truth = benchmark.measure_truth(problem, groups=4)
        assert min(truth.own) > 0  # at a minimum, a row that is left out is only ever lost
        for kind, values in found.items():
            values.append(benchmark.correlations(problem, truth, kind, "data"))
    own, collateral = (
        {kind: statistics.fmean(value[which] for value in found[kind]) for kind in found}
        for which in (0, 1)
    )
    for means in (own, collateral):
        assert means["diagonal"] >= 0.4
    assert own["ekfac"] >= own["diagonal"] - 0.05
    assert collateral["ekfac"] > collateral["diagonal"]
