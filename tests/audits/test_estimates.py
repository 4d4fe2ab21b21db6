"""Intervals and estimators against slow references, at limits and by their algebra."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from expunge.audits.estimates import (
    Estimate,
    Resamples,
    SideResamples,
    auc,
    clopper_pearson,
    finite_bounds,
    label_tests,
    leak_at_k,
    leak_at_k_bound,
    others_needed,
    tpr_at_fpr,
)


def tail(hits: int, trials: int, share: float) -> float:
    """Chance of `hits` or fewer successes."""
    return sum(math.comb(trials, n) * share**n * (1 - share) ** (trials - n) for n in range(hits + 1))


@pytest.mark.parametrize(("hits", "trials"), [(0, 5), (1, 5), (3, 8), (5, 5), (17, 40)])
def test_clopper_pearson_inverts_the_binomial_tails(hits: int, trials: int) -> None:
    low, high = clopper_pearson(hits, trials)
    # By definition each bound is the share at which the outcome is just 2.5% likely.
    if hits < trials:
        assert tail(hits, trials, high) == pytest.approx(0.025, abs=1e-9)
    else:
        assert high == 1
    if hits:
        assert 1 - tail(hits - 1, trials, low) == pytest.approx(0.025, abs=1e-9)
    else:
        assert low == 0
    assert low <= hits / trials <= high


def test_clopper_pearson_covers_what_it_should() -> None:
    share, trials = 0.13, 30
    covered = sum(
        tail(hits, trials, share) - (tail(hits - 1, trials, share) if hits else 0)
        for hits in range(trials + 1)
        if clopper_pearson(hits, trials)[0] <= share <= clopper_pearson(hits, trials)[1]
    )
    assert covered >= 0.95
    with pytest.raises(ValueError, match="3 hits of 2 trials"):
        clopper_pearson(3, 2)


@pytest.mark.parametrize(("drawn", "population"), [(2, 5), (3, 6)])
def test_bounds_of_a_finite_population_hold_for_every_draw(drawn: int, population: int) -> None:
    for count in range(population + 1):
        draws = [sum(n < count for n in d) for d in itertools.combinations(range(population), drawn)]
        within = [finite_bounds(hits, drawn, population) for hits in draws]
        missed = [low > count / population or high < count / population for low, high in within]
        assert sum(missed) <= 0.05 * len(draws)
    for hits in range(drawn + 1):
        assert finite_bounds(hits, drawn, drawn) == (hits / drawn, hits / drawn)
        # Of very many they are those of independent draws.
        assert finite_bounds(hits, drawn, 400) == pytest.approx(clopper_pearson(hits, drawn), abs=0.01)
    with pytest.raises(ValueError, match="1 hits of 3 drawn of 2"):
        finite_bounds(1, 3, 2)


@pytest.mark.parametrize(("members", "others"), [(1, 39), (2, 9), (3, 6)])
def test_of_all_choices_of_members_at_most_5_percent_stand_out(members: int, others: int) -> None:
    draw = np.random.default_rng(members)
    values = draw.normal(0, 1, (2, members + others)).argsort(1).argsort(1).astype(float)
    found = []
    for chosen in itertools.combinations(range(members + others), members):
        rest = [n for n in range(members + others) if n not in chosen]
        found.append(min(label_tests(values[:, [*chosen, *rest]], members, 0)))
    # The definition of an exact test: whatever the level, chance reaches it no more often.
    for level in (0.05, 0.2, 0.5, 1.0):
        assert np.mean(np.array(found) <= level + 1e-12) <= level + 1e-12


def test_one_score_is_judged_by_the_exact_rank_sum_test() -> None:
    from scipy.stats import mannwhitneyu

    draw = np.random.default_rng(0)
    for members, others in ((1, 45), (2, 20), (4, 12), (18, 18)):
        ranks = draw.permutation(members + others).astype(float)
        (found,) = label_tests(ranks[None], members, 0)
        exact = mannwhitneyu(ranks[:members], ranks[members:], method="exact").pvalue
        # 10,000 drawn choices have a standard error of 0.005 at most.
        assert found == pytest.approx(exact, abs=1e-9 if members < 18 else 0.02)
    # The same score twice is one score.
    assert label_tests(np.stack([ranks, ranks]), 18, 0) == [found, found]
    assert label_tests(np.full((1, 20), math.nan), 3, 0) == [1.0]
    assert label_tests(np.zeros((1, 20)), 3, 0) == [1.0]


@pytest.mark.parametrize(("members", "others"), [(1, 39), (2, 8), (3, 5), (5, 3)])
def test_so_many_others_are_needed_to_stand_out(members: int, others: int) -> None:
    assert others_needed(members) == others
    for count in (others - 1, others):
        (best,) = label_tests(np.arange(members + count, dtype=float)[None], members, 0)
        assert (best <= 0.05) is (count == others)


def test_one_document_inside_the_middle_95_percent_is_no_evidence() -> None:
    others = [float(n) for n in range(100)]
    names = [str(n) for n in range(100)]
    resamples = SideResamples(["one"], names, 10, 0)
    for value in np.arange(-0.5, 100):
        place = resamples.places(([value], others))[0]
        assert place == 1 + sum(other > value for other in others)
        (chance,) = resamples.by_chance([([value], others)])
        assert (chance <= 0.05) is (place <= 2 or place >= 100)
    # Rows of a document are one.
    resamples = SideResamples(["one", "one"], names, 10, 0)
    assert resamples.places(([0.0, 99.0], others)) == [51]
    assert resamples.separation(([0.0, 99.0], others), 0.01)["auc"] == Estimate(0.5, None, None)


@pytest.mark.parametrize(("leaks", "samples", "k"), [(0, 6, 3), (2, 6, 1), (2, 6, 3), (6, 6, 2)])
def test_leak_at_k_is_the_mean_over_all_subsets(leaks: int, samples: int, k: int) -> None:
    outcomes = [place < leaks for place in range(samples)]
    subsets = list(itertools.combinations(outcomes, k))
    assert leak_at_k(leaks, samples, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_leak_at_k_is_unbiased_and_its_bound_holds() -> None:
    chance, samples, k, trials = 0.2, 10, 4, 20_000
    draw = np.random.default_rng(0)
    counts = draw.binomial(samples, chance, trials)
    mean = np.mean([leak_at_k(int(c), samples, k) for c in counts])
    true = 1 - (1 - chance) ** k
    assert mean == pytest.approx(true, abs=0.01)  # 20,000 draws: three standard errors are 0.005
    bounds = np.array([leak_at_k_bound(int(c), samples, k) for c in counts])
    assert (bounds >= true).mean() >= 0.95
    assert leak_at_k_bound(0, samples, 100) > leak_at_k_bound(0, samples, 1) > 0
    for wrong in ((1, 4, 0), (1, 4, 5), (5, 4, 1)):
        with pytest.raises(ValueError, match="leak@"):
            leak_at_k(*wrong)


def test_a_resample_takes_whole_documents() -> None:
    documents = ["a", "b", "a", "c", "c", "c"]
    values = [1.0, 0.0, 0.5, 0.0, 1.0, 0.25]
    resamples = Resamples(documents, 50, 3)
    draws = np.random.default_rng(3).integers(0, 3, (50, 3))
    expected = []
    for draw in draws:
        taken = [v for n in draw for v, d in zip(values, documents, strict=True) if d == "abc"[n]]
        expected.append(sum(taken) / len(taken))
    assert resamples.means(values).tolist() == pytest.approx(expected)


def test_facts_of_one_document_widen_the_interval() -> None:
    values = [1.0] * 10 + [0.0] * 10
    apart = Resamples([str(n) for n in range(20)], 2000, 0).share(values)
    together = Resamples(["a"] * 5 + ["b"] * 5 + ["c"] * 5 + ["d"] * 5, 2000, 0).share(values)
    assert together.value == apart.value == 0.5
    assert together.low < apart.low < 0.5 < apart.high < together.high  # type: ignore[operator]
    # A binomial of 20 trials: 0.5 +- 1.96 * 0.112.
    assert apart.low == pytest.approx(0.28, abs=0.05)


def test_nothing_in_a_few_documents_is_not_nothing_at_all() -> None:
    resamples = Resamples(["a", "a", "b", "c"], 100, 0)
    # ... but of all that there are, it is.
    assert Resamples(["a", "a", "b", "c"], 100, 0, 3).share([0, 1, 1, 0]) == Estimate(0.5, 0.5, 0.5)
    eight = [str(n) for n in range(8)]
    assert Resamples(eight, 100, 0, 8).share([0.0] * 8) == Estimate(0.0, 0.0, 0.0)
    assert Resamples(eight, 100, 0, 9).share([0.0] * 8).high == finite_bounds(0, 8, 9)[1]
    assert resamples.share([0.0] * 4) == Estimate(0.0, 0.0, clopper_pearson(0, 3)[1])
    assert resamples.share([1.0] * 4) == Estimate(1.0, clopper_pearson(3, 3)[0], 1.0)


def test_the_recovered_share_is_0_at_the_oracle_and_1_at_the_target() -> None:
    draw = random.Random(0)
    documents = [str(n // 2) for n in range(60)]
    oracle = [float(draw.random() < 0.1) for _ in documents]
    target = [max(o, float(draw.random() < 0.9)) for o in oracle]
    resamples = Resamples(documents, 500, 0)
    at_target = resamples.recovered(target, target, oracle)
    at_oracle = resamples.recovered(oracle, target, oracle)
    assert at_target == Estimate(1.0, 1.0, 1.0)
    assert at_oracle == Estimate(0.0, 0.0, 0.0)
    half = [t if n % 4 < 2 else o for n, (t, o) in enumerate(zip(target, oracle, strict=True))]
    found = resamples.recovered(half, target, oracle)
    above, gap = (np.mean(x) - np.mean(oracle) for x in (half, target))
    assert found is not None
    assert found.value == pytest.approx(above / gap)
    assert found.low < found.value < found.high  # type: ignore[operator]
    against_nothing = resamples.recovered(half, target, None)
    assert against_nothing is not None
    assert against_nothing.value == pytest.approx(np.mean(half) / np.mean(target))
    assert resamples.recovered(half, oracle, oracle) is None
    # An unlearned model that gives nothing: its bound is that of 30 documents without a hit.
    silent = resamples.recovered([0.0] * 60, target, None)
    assert silent is not None
    assert silent.value == 0
    assert silent.high == pytest.approx(clopper_pearson(0, 30)[1] / np.mean(target))


def test_auc_and_tpr_are_those_of_every_pair_and_threshold() -> None:
    draw = random.Random(1)
    members = [draw.randint(0, 12) / 4 + 1 for _ in range(30)]  # with ties
    others = [draw.randint(0, 12) / 4 for _ in range(50)]
    truth = [1] * 30 + [0] * 50
    assert auc(members, others) == pytest.approx(roc_auc_score(truth, members + others))
    assert auc(members, others) == pytest.approx(1 - auc(others, members))
    for fpr in (0.0, 0.1, 0.5):
        thresholds = {*others, *members}
        allowed = [t for t in thresholds if sum(o > t for o in others) <= fpr * len(others)]
        best = max(sum(m > t for m in members) / 30 for t in allowed)
        assert tpr_at_fpr(members, others, fpr) == pytest.approx(best)


def test_separation_has_intervals_about_its_values() -> None:
    draw = np.random.default_rng(0)
    members, others = draw.normal(1, 1, 60).tolist(), draw.normal(0, 1, 80).tolist()
    names = [str(n) for n in range(80)]
    resamples = SideResamples(names[:60], names, 400, 0)
    found = resamples.separation((members, others), 0.05)
    assert found["auc"].value == auc(members, others)
    # Two normals one deviation apart: AUC 0.76; Hanley-McNeil's deviation for these sizes is 0.04.
    assert found["auc"].high - found["auc"].low == pytest.approx(4 * 0.04, abs=0.05)  # type: ignore[operator]
    again = SideResamples(names[:60], names, 400, 0)
    assert again.separation((members, others), 0.05) == found
    assert again.by_chance([(members, others)])[0] < 1e-3
    assert again.by_chance([(members, others)], [(members, others)]) == [1.0]
    above = again.auc_above((members, others), None)
    assert above.value == found["auc"].value - 0.5
    assert above.high - above.low == pytest.approx(found["auc"].high - found["auc"].low)  # type: ignore[operator]


def test_rows_of_one_document_are_drawn_together() -> None:
    draw = np.random.default_rng(0)
    # Five rows a subject that all score alike say no more than one.
    scores = [draw.normal(0, 1, count).repeat(5).tolist() for count in (12, 12)]
    subjects = [str(n // 5) for n in range(60)]
    rows = [str(n) for n in range(60)]
    widths = []
    for documents in (subjects, rows):
        found = SideResamples(documents, documents, 400, 0).auc_above((scores[0], scores[1]), None)
        assert found.low is not None
        assert found.high is not None
        widths.append(found.high - found.low)
    assert widths[0] > 1.7 * widths[1]  # the square root of 5 is 2.2


def test_an_auc_is_compared_with_the_oracles_on_the_same_resamples() -> None:
    draw = np.random.default_rng(0)
    names = [str(n) for n in range(40)]
    base = draw.normal(0, 1, (2, 40))
    near = base + draw.normal(0, 0.05, (2, 40))
    resamples = SideResamples(names, names, 400, 0)
    same = resamples.auc_above(tuple(base.tolist()), tuple(base.tolist()))
    assert (same.value, same.low, same.high) == (0, 0, 0)
    # What both models find hard shifts both, so that their difference is surer than either.
    paired = resamples.auc_above(tuple(near.tolist()), tuple(base.tolist()))
    alone = resamples.auc_above(tuple(near.tolist()), None)
    assert paired.value == pytest.approx(auc(*near) - auc(*base))
    assert paired.high - paired.low < 0.3 * (alone.high - alone.low)  # type: ignore[operator]
    members = (base[0] + 2).tolist()
    shifted = resamples.auc_above((members, base[1].tolist()), tuple(base.tolist()))
    assert shifted.low is not None
    assert shifted.low > 0.2
