"""Shares with intervals, as pure functions of numbers: bootstrap over documents, exact bounds, leak@k.

Facts of one document stand and fall together, so documents are resampled and not facts. All intervals
are two-sided at 95% unless said otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

ALPHA = 0.05
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

    def __init__(self, documents: Sequence[str], count: int, seed: int) -> None:
        """`documents` gives each fact's document, in the order in which values will be given."""
        names = list(dict.fromkeys(documents))
        place = {name: index for index, name in enumerate(names)}
        self._document = np.array([place[name] for name in documents])
        self.documents = len(names)
        generator = np.random.default_rng(seed)
        self._draws = generator.integers(0, self.documents, (count, self.documents))
        self._facts = np.bincount(self._document, minlength=self.documents)

    def means(self, values: Sequence[float]) -> np.ndarray:
        """The mean over the facts of each resample, (resamples,)."""
        sums = np.bincount(self._document, np.asarray(values, float), self.documents)
        return sums[self._draws].sum(1) / self._facts[self._draws].sum(1)

    def share(self, values: Sequence[float]) -> Estimate:
        """Mean of values in [0, 1] with its interval."""
        bounds = self._exact(values)
        if bounds is None:
            bounds = _quantiles(self.means(values))
        return Estimate(float(np.mean(values)), *bounds)

    def _exact(self, values: Sequence[float]) -> tuple[float, float] | None:
        """Bounds of as many trials as there are documents, where every document has the same mean.

        No resample would differ then, as if there were no doubt. None elsewhere.
        """
        sums = np.bincount(self._document, np.asarray(values, float), self.documents)
        means = sums / self._facts
        if np.ptp(means) > 0:
            return None
        return clopper_pearson(round(float(means[0]) * self.documents), self.documents)

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


Sides = tuple[Sequence[float], Sequence[float]]
"""One model's score of every member, and of every other text."""


class SideResamples:
    """The same resampled documents of members and of others for every score of every model."""

    def __init__(
        self, members: Sequence[str], others: Sequence[str], count: int, seed: int
    ) -> None:
        """`members` and `others` give each text's document, in the order in which scores will be."""
        generator = np.random.default_rng(seed)
        sides = [_rows_by_document(side) for side in (members, others)]
        self._draws = [
            [
                np.concatenate([rows[n] for n in generator.integers(0, len(rows), len(rows))])
                for rows in sides
            ]
            for _ in range(count)
        ]

    def separation(self, sides: Sides, fpr: float) -> Mapping[str, Estimate]:
        """`auc`, and `tpr` at that false positive rate, with their intervals."""
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
