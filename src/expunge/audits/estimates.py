"""Shares with intervals, as pure functions of numbers: bootstrap over documents, exact bounds, leak@k.

Facts of one document stand and fall together, so documents are resampled and not facts. All intervals
are two-sided at 95% unless said otherwise. Of a request of few documents all are asked: its shares are
counts, and their intervals the counts themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations

import numpy as np

from expunge.evaluation.outcomes import ALPHA, FEW

_LABELLINGS, _AT_ONCE = 10_000, 100
"""Of members and others: all are gone through up to so many, else so many are drawn."""
_ENOUGH = 0.5
"""Share of the resamples that a ratio must exist in to have an interval."""
Values = Sequence[float] | np.ndarray


@dataclass(frozen=True)
class Estimate:
    """A measured number and its interval; without bounds where none can be given."""

    value: float
    low: float | None
    high: float | None

    def to_json(self) -> dict[str, float | None]:
        """Six digits: further ones are rounding, which may change with the machine."""
        return {k: None if v is None else round(float(v), 6) for k, v in asdict(self).items()}


def clopper_pearson(hits: int, trials: int, alpha: float = ALPHA) -> tuple[float, float]:
    """Exact bounds of a binomial proportion, `alpha` / 2 on each side. Biometrika 26 (1934), 404.

    Raises ValueError unless 0 <= hits <= trials and trials > 0.
    """
    from scipy.stats import beta

    if not 0 <= hits <= trials or trials < 1:
        raise ValueError(f"{hits} hits of {trials} trials")
    low = 0.0 if hits == 0 else float(beta.ppf(alpha / 2, hits, trials - hits + 1))
    high = 1.0 if hits == trials else float(beta.ppf(1 - alpha / 2, hits + 1, trials - hits))
    return low, high


def finite_bounds(hits: int, drawn: int, population: int) -> tuple[float, float]:
    """Exact bounds of a share of `population` of which `drawn` were looked at, none twice.

    The fewest and most of the population that leave what was found likely, alpha / 2 on each side of the
    hypergeometric distribution. All looked at: the share itself. Raises ValueError unless
    0 <= hits <= drawn <= population and drawn > 0.
    """
    from scipy.stats import hypergeom

    if not 0 <= hits <= drawn <= population or drawn < 1:
        raise ValueError(f"{hits} hits of {drawn} drawn of {population}")
    counts = np.arange(hits, population - drawn + hits + 1)
    below = hypergeom.cdf(hits, population, counts, drawn)
    above = hypergeom.sf(hits - 1, population, counts, drawn)
    likely = counts[(below > ALPHA / 2) & (above > ALPHA / 2)]
    return float(likely[0] / population), float(likely[-1] / population)


def leak_at_k(leaks: int, samples: int, k: int) -> float:
    """Unbiased estimate of the chance that one of `k` samples leaks: 1 - C(n - c, k) / C(n, k).

    `leaks` c of `samples` n did; arXiv 2511.04934, with the estimator of arXiv 2107.03374. Raises
    ValueError unless 1 <= k <= n and 0 <= c <= n.
    """
    if not 1 <= k <= samples or not 0 <= leaks <= samples:
        raise ValueError(f"leak@{k} of {leaks} leaks in {samples} samples")
    return 1.0 - math.comb(samples - leaks, k) / math.comb(samples, k)


def leak_at_k_bound(leaks: int, samples: int, k: int, alpha: float = ALPHA) -> float:
    """Upper bound of leak@k for one fact: that of one sample's chance, taken `k` times.

    One-sided at 1 - `alpha`; arXiv 2410.03523 bounds leaks in the same way. It does not need k <= n.
    """
    return 1.0 - (1.0 - clopper_pearson(leaks, samples, 2 * alpha)[1]) ** k


class Resamples:
    """The same resampled documents for every measure, so that models are compared on equal draws."""

    def __init__(self, documents: Sequence[str], count: int, seed: int, of: int | None = None) -> None:
        """`documents` gives each fact's document, in the order in which values will be given.

        `of` is how many documents they were drawn from; None: so many that it does not matter.
        """
        names = list(dict.fromkeys(documents))
        place = {name: index for index, name in enumerate(names)}
        self._document = np.array([place[name] for name in documents])
        self.documents, self._of = len(names), of
        generator = np.random.default_rng(seed)
        self._draws = generator.integers(0, self.documents, (count, self.documents))
        self._facts = np.bincount(self._document, minlength=self.documents)

    def means(self, values: Values) -> np.ndarray:
        """The mean over the facts of each resample, (resamples,)."""
        sums = np.bincount(self._document, np.asarray(values, float), self.documents)
        return sums[self._draws].sum(1) / self._facts[self._draws].sum(1)

    def mean(self, values: Values) -> Estimate:
        """Mean of any values with its interval."""
        return Estimate(float(np.mean(values)), *_quantiles(self.means(values)))

    def share(self, values: Sequence[float]) -> Estimate:
        """Mean of values in [0, 1] with its interval, exact where resamples would not differ."""
        bounds = self._exact(values)
        return self.mean(values) if bounds is None else Estimate(float(np.mean(values)), *bounds)

    def _exact(self, values: Sequence[float]) -> tuple[float, float] | None:
        """The mean itself where few documents were all asked; bounds of as many draws as there are
        documents, where every document has the same mean.

        No resample would differ then, as if there were no doubt. None elsewhere.
        """
        if self._of == self.documents <= FEW:
            return (float(np.mean(values)),) * 2
        sums = np.bincount(self._document, np.asarray(values, float), self.documents)
        means = sums / self._facts
        if np.ptp(means) > 0:
            return None
        hits = round(float(means[0]) * self.documents)
        if self._of is None:
            return clopper_pearson(hits, self.documents)
        return finite_bounds(hits, self.documents, self._of)

    def recovered(
        self,
        unlearned: Sequence[float],
        target: Sequence[float],
        oracle: Sequence[float] | None,
    ) -> Estimate | None:
        """(unlearned - oracle) / (target - oracle), arXiv 2407.06460; without an oracle against 0.

        1: all of what the target has beyond the oracle; 0: none; None where the target has nothing
        beyond the oracle.
        """
        floor = [0.0] * len(unlearned) if oracle is None else oracle
        above, gap = np.mean(unlearned) - np.mean(floor), np.mean(target) - np.mean(floor)
        if gap <= 0:
            return None
        value = float(above / gap)
        floors = self.means(floor)
        gaps = self.means(target) - floors
        ratios = (self.means(unlearned) - floors)[gaps > 0] / gaps[gaps > 0]
        if len(ratios) < _ENOUGH * len(gaps):
            return Estimate(value, None, None)
        low, high = _quantiles(ratios)
        bounds = self._exact(unlearned)
        if bounds is not None:
            low = min(low, float((bounds[0] - np.mean(floor)) / gap))
            high = max(high, float((bounds[1] - np.mean(floor)) / gap))
        return Estimate(value, low, high)


def _quantiles(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [ALPHA / 2, 1 - ALPHA / 2])
    return float(low), float(high)


def auc(members: Values, others: Values) -> float:
    """Chance that a member scores higher than another text; ties count half."""
    ordered = np.sort(np.asarray(others, float))
    values = np.asarray(members, float)
    below = np.searchsorted(ordered, values, side="left")
    upto = np.searchsorted(ordered, values, side="right")
    return float((below + upto).mean() / (2 * len(ordered)))


def tpr_at_fpr(members: Values, others: Values, fpr: float) -> float:
    """Share of members above the threshold that at most `fpr` of the others exceed."""
    ordered = np.sort(np.asarray(others, float))[::-1]
    threshold = ordered[math.floor(fpr * len(ordered))]
    return float((np.asarray(members, float) > threshold).mean())


def label_tests(values: np.ndarray, members: int, seed: int) -> list[float]:
    """By score how often chance would set the members as far apart by any score: two-sided, exact.

    `values` (scores, documents), the members first. A score's statistic is the distance of the members'
    sum from its expectation, in units of the score's deviation; under chance every choice of as many
    documents is equally likely, and the largest statistic of all scores counts, so that all of them
    together are wrong in 5% at most (Westfall and Young, 1993). Up to 10,000 choices are all gone
    through. Of more, so many are drawn and the one at hand is counted in (Phipson and Smyth, 2010).
    """
    documents = values.shape[1]
    spread = values.std(1, keepdims=True)
    scaled = (values - values.mean(1, keepdims=True)) / np.where(spread > 0, spread, 1.0)

    def largest(chosen: np.ndarray) -> np.ndarray:
        return np.max([np.abs(row[chosen].sum(1)) for row in scaled], axis=0)

    drawn = math.comb(documents, members) > _LABELLINGS
    if drawn:
        generator = np.random.default_rng(seed)
        by_chance = np.concatenate(
            [
                largest(generator.random((_AT_ONCE, documents)).argsort(1)[:, :members])
                for _ in range(_LABELLINGS // _AT_ONCE)
            ]
        )
    else:
        by_chance = largest(np.array(list(combinations(range(documents), members))))
    found = np.abs(scaled[:, :members].sum(1))
    # Sums of the same numbers in another order differ by rounding; what is no number is chance.
    hits = (~(by_chance[None] < found[:, None] - 1e-9)).sum(1)
    return [float(p) for p in (hits + drawn) / (len(by_chance) + drawn)]


def others_needed(members: int) -> int:
    """The fewest other documents of which `members` can stand out, in either direction, at 95%."""
    needed = 1
    while 2 / math.comb(members + needed, members) > ALPHA:
        needed += 1
    return needed


Sides = tuple[Sequence[float], Sequence[float]]
"""One model's score of every member, and of every other text."""


class SideResamples:
    """The same resampled documents of members and of others for every score of every model."""

    def __init__(self, members: Sequence[str], others: Sequence[str], count: int, seed: int) -> None:
        """`members` and `others` give each text's document, in the order in which scores will be."""
        generator = np.random.default_rng(seed)
        sides = [_rows_by_document(side) for side in (members, others)]
        self.members, self.others = (len(set(side)) for side in (members, others))
        self._documents = [f"member {name}" for name in members] + [f"other {name}" for name in others]
        self._seed = seed
        self._draws = [
            [
                np.concatenate([rows[n] for n in generator.integers(0, len(rows), len(rows))])
                for rows in sides
            ]
            for _ in range(count)
        ]

    def separation(self, sides: Sides, fpr: float) -> Mapping[str, Estimate]:
        """`auc`, and `tpr` at that false positive rate, with their intervals; few members have none."""
        if self.members <= FEW:
            values = {"auc": auc(*sides), "tpr": tpr_at_fpr(*sides, fpr)}
            return {name: Estimate(value, None, None) for name, value in values.items()}
        tprs = [tpr_at_fpr(*drawn, fpr) for drawn in self._drawn(sides)]
        return {
            "auc": Estimate(auc(*sides), *_quantiles(self._aucs(sides))),
            "tpr": Estimate(tpr_at_fpr(*sides, fpr), *_quantiles(np.array(tprs))),
        }

    def auc_above(self, sides: Sides, reference: Sides | None) -> Estimate:
        """How far the AUC lies above a reference's on the same texts; above 0.5 without one."""
        if reference is None:
            return Estimate(auc(*sides) - 0.5, *_quantiles(self._aucs(sides) - 0.5))
        above = self._aucs(sides) - self._aucs(reference)
        return Estimate(auc(*sides) - auc(*reference), *_quantiles(above))

    def places(self, sides: Sides) -> list[int]:
        """Of each member document its place among all others, 1 for the highest mean score."""
        values = self._means(sides)
        members, others = values[: self.members], values[self.members :]
        return [1 + int((others > value).sum()) for value in members]

    def by_chance(
        self, scores: Sequence[Sides], reference: Sequence[Sides] | None = None
    ) -> list[float]:
        """By score how likely chance is to tell the two sides as well (`label_tests`).

        What is compared is each document's rank by its mean score; with a reference, how far it is from
        the one that it has there.
        """
        from scipy.stats import rankdata

        ranks = rankdata([self._means(sides) for sides in scores], axis=1)
        if reference is not None:
            ranks -= rankdata([self._means(sides) for sides in reference], axis=1)
        return label_tests(ranks, self.members, self._seed)

    def _means(self, sides: Sides) -> np.ndarray:
        """The mean score of every document, members first."""
        values = np.concatenate([np.asarray(side, float) for side in sides])
        return np.array([values[rows].mean() for rows in _rows_by_document(self._documents)])

    def _aucs(self, sides: Sides) -> np.ndarray:
        return np.array([auc(*drawn) for drawn in self._drawn(sides)])

    def _drawn(self, sides: Sides) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        inside, outside = (np.asarray(side, float) for side in sides)
        for members, others in self._draws:
            yield inside[members], outside[others]


def _rows_by_document(documents: Sequence[str]) -> list[list[int]]:
    rows: dict[str, list[int]] = {}
    for row, document in enumerate(documents):
        rows.setdefault(document, []).append(row)
    return list(rows.values())
