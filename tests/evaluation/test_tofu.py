"""TOFU's formulas against slow references, at their limits, and on the authors' published logs."""

from __future__ import annotations

import json
import math
from statistics import fmean
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import SHARED
from expunge.evaluation.tofu import (
    KEPT,
    SetLosses,
    SetName,
    all_scores,
    choice_probability,
    forget_quality,
    forget_truth_ratio,
    kept_truth_ratio,
    log_truth_ratio,
    model_utility,
    probability,
)

LOGS = SHARED / "tofu" / "published"
FILES: dict[SetName, str] = {
    "forget": "eval_log_forget.json",
    "retain": "eval_log.json",
    "real_authors": "eval_real_author_wo_options.json",
    "world_facts": "eval_real_world_wo_options.json",
}
PART = {"probability", "rouge", "truth_ratio"}

losses = st.floats(0, 30)
wrongs = st.lists(losses, min_size=1, max_size=5)


def published(name: str) -> dict[SetName, SetLosses]:
    path = LOGS / f"llama2-7b_{name}_wd0.01.json"
    if not path.is_file():
        pytest.skip("shared/tofu is not here")
    log = json.loads(path.read_text())

    def read(values: dict[str, Any]) -> SetLosses:
        def column(title: str) -> list[Any]:
            return [values[title][row] for row in values["avg_gt_loss"]]

        return SetLosses(
            answer=column("avg_gt_loss"),
            rouge=column("rougeL_recall"),
            right=column("avg_paraphrased_loss"),
            wrong=column("average_perturb_loss"),
        )

    return {name: read(log[file]) for name, file in FILES.items()}


def test_the_published_logs_give_the_reference_values() -> None:
    full, oracle = published("full"), published("retain90")
    ratios = oracle["forget"].log_truth_ratios()
    scores, best = all_scores(full, ratios), all_scores(oracle, ratios)
    quality = scores["forget_quality"]
    assert quality is not None
    assert abs(math.log10(quality) - math.log10(1.834066410994743e-21)) < 1e-6
    assert best["forget_quality"] == 1
    expected = {
        "model_utility": 0.6226773637427151,
        "forget_truth_ratio": 0.5159854212808593,
        "real_authors_probability": 0.455482,
        "real_authors_rouge": 0.933,
        "real_authors_truth_ratio": 0.596229,
        "world_facts_probability": 0.418562,
        "world_facts_rouge": 0.882479,
        "world_facts_truth_ratio": 0.539033,
        "retain_probability": 0.989527,
        "retain_rouge": 0.985655,
        "retain_truth_ratio": 0.474699,
    }
    assert {name: scores[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert best["model_utility"] == pytest.approx(0.613744995233942, abs=1e-6)
    assert best["forget_truth_ratio"] == pytest.approx(0.6740192657877031, abs=1e-6)


@given(right=losses, wrong=wrongs)
def test_a_truth_ratio_is_that_of_products_of_probabilities(right: float, wrong: list[float]) -> None:
    geometric = math.prod(math.exp(-loss) for loss in wrong) ** (1 / len(wrong))
    authors = math.exp(log_truth_ratio(right, wrong))
    assert authors == pytest.approx(math.exp(-right) / geometric, rel=1e-6)
    reciprocal = math.exp(log_truth_ratio(right, wrong, "openunlearning"))
    assert reciprocal == pytest.approx(1 / authors)
    arithmetic = fmean(math.exp(-loss) for loss in wrong) / math.exp(-right)
    paper = math.exp(log_truth_ratio(right, wrong, "paper"))
    assert paper == pytest.approx(arithmetic, rel=1e-6)
    assert paper >= reciprocal * (1 - 1e-9)  # no geometric mean exceeds the arithmetic one


def test_all_readings_agree_on_one_wrong_answer() -> None:
    assert log_truth_ratio(1.5, [3.5]) == 2
    assert log_truth_ratio(1.5, [3.5], "openunlearning") == -2
    assert log_truth_ratio(1.5, [3.5], "paper") == pytest.approx(-2)


@given(st.lists(st.tuples(losses, wrongs), min_size=1, max_size=8))
def test_the_aggregates_are_the_same_in_both_readings_of_code(
    rows: list[tuple[float, list[float]]],
) -> None:
    mine = [log_truth_ratio(right, wrong) for right, wrong in rows]
    theirs = [log_truth_ratio(right, wrong, "openunlearning") for right, wrong in rows]
    ratios = [math.exp(each) for each in mine]
    assert forget_truth_ratio(mine) == pytest.approx(fmean(min(r, 1 / r) for r in ratios))
    assert forget_truth_ratio(theirs) == pytest.approx(forget_truth_ratio(mine))
    expected = fmean(max(0, 1 - 1 / r) for r in ratios)
    assert kept_truth_ratio(mine) == pytest.approx(expected, abs=1e-9)
    assert kept_truth_ratio(theirs, "openunlearning") == pytest.approx(expected, abs=1e-9)


def test_losses_beyond_any_exponent_still_have_scores() -> None:
    assert forget_truth_ratio([log_truth_ratio(0, [5000.0])]) == 0
    assert kept_truth_ratio([log_truth_ratio(0, [5000.0])]) == 1
    assert kept_truth_ratio([log_truth_ratio(5000.0, [0])]) == 0
    assert log_truth_ratio(5000.0, [3000.0, 4000.0], "paper") == pytest.approx(2000 - math.log(2))
    assert choice_probability(5000.0, [5000.0, 6000.0]) == 0.5
    assert choice_probability(5000.0, [1.0]) == 0


@given(answer=losses, wrong=wrongs)
def test_probabilities(answer: float, wrong: list[float]) -> None:
    own = math.exp(-answer)
    assert probability(answer) == pytest.approx(own)
    expected = own / (own + sum(math.exp(-loss) for loss in wrong))
    assert choice_probability(answer, wrong) == pytest.approx(expected)


def slow_statistic(first: list[float], second: list[float]) -> float:
    """The largest distance of two empirical distributions, at every value."""

    def below(values: list[float], most: float) -> float:
        return sum(value <= most for value in values) / len(values)

    return max(abs(below(first, each) - below(second, each)) for each in first + second)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([0.1, 0.5, 0.9, 1.4], [0.2, 0.6, 1.0, 1.1, 1.5]),
        ([0.0, 0.1, 0.2, 0.3], [1.0, 1.1, 1.2]),
        ([0.5, 0.7], [0.4, 0.6, 0.8]),
    ],
)
def test_forget_quality_is_the_share_of_orders_as_far_apart(
    first: list[float], second: list[float]
) -> None:
    """Exact, by every way of dividing the pooled values: under the null all are equally likely."""
    from itertools import combinations

    pooled = first + second
    seen = slow_statistic(first, second)
    orders = list(combinations(range(len(pooled)), len(first)))
    far = 0
    for chosen in orders:
        one = [pooled[n] for n in chosen]
        other = [pooled[n] for n in range(len(pooled)) if n not in chosen]
        far += slow_statistic(one, other) >= seen - 1e-12
    assert forget_quality(first, second) == pytest.approx(far / len(orders))
    # Symmetrical, and the order alone counts: the same for ratios, logarithms and reciprocals.
    assert forget_quality(second, first) == pytest.approx(forget_quality(first, second))
    turned = forget_quality([-each for each in first], [-each for each in second])
    assert turned == pytest.approx(forget_quality(first, second))


def nine(value: float) -> dict[SetName, dict[str, float | None]]:
    return {name: dict.fromkeys(PART, value) for name in KEPT}


def test_model_utility_is_one_harmonic_mean_of_nine() -> None:
    assert model_utility(nine(0.5)) == pytest.approx(0.5)
    parts = nine(0.5)
    parts["retain"]["rouge"] = 0.25
    assert model_utility(parts) == pytest.approx(9 / (8 / 0.5 + 1 / 0.25))
    parts["retain"]["rouge"] = 0.0
    assert model_utility(parts) == 0
    parts["retain"]["rouge"] = None
    assert model_utility(parts) is None
    parts = nine(0.5)
    assert model_utility({name: parts[name] for name in KEPT[:2]}) is None


def test_what_has_no_material_is_null() -> None:
    plain = SetLosses(answer=[math.log(2)], rouge=[0.5])
    scores = all_scores({"forget": plain, "real_authors": plain}, oracle=[0.1])
    measured = {name: value for name, value in scores.items() if value is not None}
    assert measured == pytest.approx(
        {"forget_probability": 0.5, "forget_rouge": 0.5, "real_authors_rouge": 0.5}
    )
    full = SetLosses(answer=[1.0], rouge=[1.0], right=[1.0], wrong=[[2.0]])
    assert all_scores({"forget": full})["forget_quality"] is None
    assert all_scores({"forget": full}, [1.0])["forget_quality"] == 1
