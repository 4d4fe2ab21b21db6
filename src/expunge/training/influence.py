"""What an influence.json does to a run: forget rows left out, retain rows taken more often."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from expunge.analysis.influence_file import RowsAtRisk, sampling_weights
from expunge.data.tokenization import Example
from expunge.errors import InputError
from expunge.training.options import TrainingOptions


@dataclass(frozen=True)
class InfluenceUsed:
    """What a run took from an influence.json."""

    sha256: str
    """Of the file."""
    model_sha256: Mapping[str, str]
    """Of the files of the model that it is about."""
    skipped: int
    """Forget rows that are not trained on, as the target does not know them."""
    mean_weight: float
    """How often a retain row is taken in an epoch, on average."""

    @property
    def said(self) -> str:
        """What the user is told of skipped rows."""
        return (
            f"{self.skipped} forget rows are gone already and not trained on (--skip-gone); they are"
            " still measured"
        )

    def describe(self) -> dict[str, Any]:
        """What the manifest says of it."""
        return {
            "sha256": self.sha256,
            "forget_rows_skipped": self.skipped,
            "mean_retain_weight": self.mean_weight,
        }


def applied(
    influence: RowsAtRisk,
    options: TrainingOptions,
    forget: Sequence[Example],
    retain: Sequence[Example],
) -> tuple[Sequence[Example], Sequence[Example], InfluenceUsed]:
    """The examples without forget rows that are gone, and with weights on the retain rows.

    Raises InputError where no forget row is left.
    """
    skipped: set[str] = set()
    if options.skip_gone:
        skipped = {example.row_id for example in forget} & influence.gone
        forget = [example for example in forget if example.row_id not in skipped]
        if not forget:
            raise InputError(
                f"--skip-gone: all {len(skipped)} forget rows are gone already, there is nothing to"
                " unlearn; leave it out to unlearn them all the same"
            )
    mean = 1.0
    if options.retain_sampling == "influence" and retain:
        trained = {example.row_id for example in retain}
        values = {row: value for row, value in influence.collateral.items() if row in trained}
        weights = sampling_weights(values, options.risk_factor)
        retain = [replace(e, weight=weights[e.row_id]) for e in retain]
        mean = sum(example.weight for example in retain) / len(retain)
    used = InfluenceUsed(influence.sha256, influence.model_sha256, len(skipped), mean)
    return forget, retain, used
