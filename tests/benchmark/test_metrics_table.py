"""benchmarks/metrics.py: its formulas against slow references, and all of it on a tiny benchmark."""

from __future__ import annotations

import importlib
import itertools
import random
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from expunge.benchmark.build import build
from expunge.benchmark.generator import BenchmarkSettings
from expunge.benchmark.recipe import PretrainingSettings

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
PARTS = ("all", "shown", "held out")


@pytest.fixture
def metrics(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("metrics")


def cells(table: str) -> dict[str, list[str]]:
    """By metric the rest of its line."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {line[0]: line[1:] for line in lines[2:]}


@pytest.mark.parametrize(
    ("oracle", "unlearned", "wanted"),
    [
        ((0.0, 0.5), (0.0, 0.5), 1.0),  # it relearns as the oracle learns
        ((0.0, 0.25), (0.0, 1.0), 0.25),
        ((0.25, 0.5), (0.5, 1.0), 0.5),  # of changes, not of values
        ((0.0, 1.0), (0.0, 0.5), 1.0),  # slower than the oracle
        ((0.0, 0.0), (0.0, 0.5), 0.0),  # all that came back was hidden
        ((0.5, 0.25), (0.0, 0.5), 0.0),
        ((0.0, 0.5), (0.5, 0.5), 1.0),  # nothing came to light
        ((0.0, -0.5), (0.5, 0.25), 1.0),
    ],
)
def test_robustness_at_its_limits(metrics: Any, oracle: Any, unlearned: Any, wanted: float) -> None:
    assert metrics.robustness(oracle, unlearned) == wanted


def test_robustness_has_no_unit(metrics: Any) -> None:
    oracle, unlearned = (-7.0, -6.0), (-8.0, -5.0)
    expected = float(Fraction(1, 3))
    assert metrics.robustness(oracle, unlearned) == pytest.approx(expected, abs=1e-15)
    scaled = [tuple(3.0 + 10.0 * v for v in change) for change in (oracle, unlearned)]
    assert metrics.robustness(*scaled) == pytest.approx(expected, abs=1e-14)  # rounding of the sums


def member(knows: bool | None, draw: random.Random, kept: float | None = None) -> dict[str, Any]:
    """Made-up values; rounded, so that some are equal."""
    names = ("knowledge", "truth ratio")
    return {
        "knows": knows,
        "kept": kept,
        **{
            when: {part: {name: round(draw.random(), 1) for name in names} for part in PARTS}
            for when in ("before", "after")
        },
    }


def test_each_cell_is_that_of_a_slow_reference(metrics: Any) -> None:
    draw = random.Random(0)
    found: dict[str, dict[str, Any]] = {}
    for benchmark in ("b0", "b1"):
        mine = {f"k{n}": member(True, draw) for n in range(3)}
        mine |= {f"n{n}": member(False, draw) for n in range(3)}
        mine |= {"target": member(True, draw, 1.0), "oracle": member(False, draw)}
        mine |= {n: member(None, draw, 0.8) for n in ("good", "unchanged")}
        for name, share in (("target", 1.0), ("good", 0.8), ("unchanged", 0.9)):
            mine[name]["before"]["all"]["knowledge"] = share
        found[benchmark] = mine | {"broken": {**mine["good"], "kept": 0.7}}
    everyone = [each for mine in found.values() for each in mine.values()]
    lines = cells(metrics.table(found))
    for metric, sign in (("knowledge", 1), ("truth ratio", -1)):
        for column, (when, part) in ((1, ("before", "all")), (2, ("after", "held out"))):
            pools = [
                [sign * each[when][part][metric] for each in everyone if each["knows"] is knows]
                for knows in (True, False)
            ]
            wins = [(a > b) + (a == b) / 2 for a, b in itertools.product(*pools)]
            assert lines[metric][column].split()[0] == f"{sum(wins) / len(wins):.2f}"
        for column, part in ((3, "shown"), (4, "held out")):
            ratios = []
            for mine in found.values():
                gains = [
                    sign * (mine[n]["after"][part][metric] - mine[n]["before"][part][metric])
                    for n in ("oracle", "good")
                ]
                ratios.append(1.0 if gains[1] <= 0 else min(1.0, max(0.0, gains[0] / gains[1])))
            assert lines[metric][column] == f"{sum(ratios) / len(ratios):.2f}"
    assert "these forgot and kept the rest: good (b0), good (b1)." in metrics.note(found)
    without = {b: {n: m for n, m in mine.items() if n != "good"} for b, mine in found.items()}
    assert cells(metrics.table(without))["knowledge"][3:] == ["-", "-"]


@pytest.mark.slow
def test_a_tiny_benchmark_is_measured_once(
    metrics: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = PretrainingSettings(
        vocabulary=400, layers=1, width=16, heads=2, feed_forward=32, epochs=1, batch_tokens=8192
    )
    rows = BenchmarkSettings(documents_per_task=1, story_words=0)
    directory = build(tmp_path / "tiny", rows, pretraining=training).directory
    every, named = metrics.members, ("oracle", "taught all", "gradient-difference")
    monkeypatch.setattr(metrics, "members", lambda *of: [m for m in every(*of) if m.name in named])
    # After one epoch the target knows nothing, which a run refuses.
    monkeypatch.setattr(metrics, "unlearn", partial(metrics.unlearn, unknown_rows="unlearn"))
    found = metrics.measured(directory, tmp_path / "out")
    assert [found[name]["knows"] for name in named] == [False, True, None]
    oracle, taught = (found[name]["before"]["all"] for name in named[:2])
    assert set(metrics.LOSING) < set(oracle)
    assert taught["loss of answers"] < oracle["loss of answers"]
    assert taught["loss of documents"] < oracle["loss of documents"]
    for mine in found.values():  # relearning lowers the losses of what it shows
        before, after = (mine[when]["shown"]["loss of documents"] for when in ("before", "after"))
        assert after < before
    monkeypatch.setattr(metrics, "load_model", None)
    assert metrics.measured(directory, tmp_path / "out") == found
    text = "".join(file.read_text(encoding="utf-8") for file in (tmp_path / "out" / "tiny").iterdir())
    row = (directory / "forget.jsonl").read_text(encoding="utf-8").splitlines()[0]
    assert row.partition('"input": "')[2][:20] not in text
