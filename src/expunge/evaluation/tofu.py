"""The scores of TOFU (arXiv 2401.06121), as pure functions of losses.

l(a) is the mean loss of a token of answer a after its question, in nats, and P(a) = exp(-l(a)). The
truth ratio of a row compares a right answer with wrong ones of the same form:

    authors         R = exp(mean_j l(wrong_j) - l(right)), as the authors' aggregation computes it
    openunlearning  1/R, as OpenUnlearning does
    paper           mean_j P(wrong_j) / P(right), equation 1 of the paper

It is kept as its logarithm, which no loss makes overflow. A set's truth ratio is one for both readings
of code; forget quality too, for the test of Kolmogorov and Smirnov looks at the order alone.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Reading = Literal["authors", "openunlearning", "paper"]
SetName = Literal["forget", "retain", "real_authors", "world_facts"]
KEPT: tuple[SetName, ...] = ("retain", "real_authors", "world_facts")
"""Sets that model utility is of."""
GENERAL = ("real_authors", "world_facts")
"""Sets whose probability is relative to the wrong answers'."""
PARTS = ("probability", "rouge", "truth_ratio")


@dataclass(frozen=True, repr=False)
class SetLosses:
    """One set, by row; losses are means over an answer's tokens, in nats."""

    answer: Sequence[float]
    rouge: Sequence[float]
    """ROUGE-L recall of the greedy answer, in [0, 1]."""
    right: Sequence[float] | None = None
    """Of the right answer in the wrong ones' form; None where the rows have none."""
    wrong: Sequence[Sequence[float]] | None = None

    def log_truth_ratios(self, reading: Reading = "authors") -> list[float] | None:
        """By row."""
        if self.right is None or self.wrong is None:
            return None
        pairs = zip(self.right, self.wrong, strict=True)
        return [log_truth_ratio(right, wrong, reading) for right, wrong in pairs]


def probability(loss: float) -> float:
    """P(a) of an answer, a token: the geometric mean of its tokens' probabilities."""
    return math.exp(-loss)


def choice_probability(answer: float, wrong: Sequence[float]) -> float:
    """P(a) / (P(a) + sum_j P(wrong_j)), of losses."""
    low = min(answer, *wrong)  # the largest term is then 1
    own, *others = (math.exp(low - loss) for loss in (answer, *wrong))
    return own / (own + sum(others))


def log_truth_ratio(right: float, wrong: Sequence[float], reading: Reading = "authors") -> float:
    """The logarithm of a row's truth ratio, of losses; see above."""
    if reading == "paper":
        low = min(wrong)
        mean = statistics.fmean(math.exp(low - loss) for loss in wrong)
        return math.log(mean) - low + right
    log_ratio = statistics.fmean(wrong) - right
    return log_ratio if reading == "authors" else -log_ratio


def forget_truth_ratio(log_ratios: Sequence[float]) -> float:
    """Mean min(R, 1/R), in (0, 1]: 1 where right answers are no likelier than wrong ones."""
    return statistics.fmean(math.exp(-abs(value)) for value in log_ratios)


def kept_truth_ratio(log_ratios: Sequence[float], reading: Reading = "authors") -> float:
    """Mean max(0, 1 - 1/R), in [0, 1), R as the authors read it: 1 where wrong ones are impossible."""
    sign = -1 if reading == "authors" else 1
    return statistics.fmean(max(0.0, -math.expm1(min(0.0, sign * each))) for each in log_ratios)


def forget_quality(unlearned: Sequence[float], oracle: Sequence[float]) -> float:
    """p-value of the two-sided test of Kolmogorov and Smirnov between the truth ratios of two models.

    Truth ratios or their logarithms, in any reading. Above 0.05 the two are usually called alike.
    """
    from scipy.stats import ks_2samp

    return float(ks_2samp(unlearned, oracle).pvalue)


def set_scores(name: SetName, losses: SetLosses) -> dict[str, float | None]:
    """Probability, ROUGE and truth ratio of a set in [0, 1]; None where wrong answers are missing."""
    ratios = losses.log_truth_ratios()
    mean: float | None = None
    if name not in GENERAL:
        mean = statistics.fmean(map(probability, losses.answer))
    elif losses.wrong is not None:
        pairs = zip(losses.answer, losses.wrong, strict=True)
        mean = statistics.fmean(choice_probability(answer, wrong) for answer, wrong in pairs)
    aggregate = forget_truth_ratio if name == "forget" else kept_truth_ratio
    values = (mean, statistics.fmean(losses.rouge), None if ratios is None else aggregate(ratios))
    return dict(zip(PARTS, values, strict=True))


def model_utility(kept: Mapping[SetName, Mapping[str, float | None]]) -> float | None:
    """Harmonic mean of the nine: three parts of each of the kept sets; None where one is missing."""
    values = [kept.get(name, {}).get(part) for name in KEPT for part in PARTS]
    if any(value is None for value in values):
        return None
    return statistics.harmonic_mean([value for value in values if value is not None])


def all_scores(
    sets: Mapping[SetName, SetLosses], oracle: Sequence[float] | None = None
) -> dict[str, float | None]:
    """Every score by name, such as retain_rouge; what there is no material for is None.

    `oracle` are the log truth ratios of the retrained model's forget rows.
    """
    names: tuple[SetName, ...] = ("forget", *KEPT)
    nothing: dict[str, float | None] = dict.fromkeys(PARTS)
    parts = {name: set_scores(name, sets[name]) if name in sets else nothing for name in names}
    ratios = sets["forget"].log_truth_ratios() if "forget" in sets else None
    quality = None if ratios is None or oracle is None else forget_quality(ratios, oracle)
    return {
        "forget_quality": quality,
        "model_utility": model_utility(parts),
        **{f"{name}_{part}": parts[name][part] for name in names for part in PARTS},
    }
