"""IDK with DPO: a refusal is preferred over the forget answer.

    L = -(2 / beta) * mean_F log sigmoid(beta * (log (pi / pi_ref)(refusal) - log (pi / pi_ref)(output)))
        + w * CE(retain)

given each row's input. The preference baseline of TOFU (Maini et al., arXiv 2401.06121, section 4), by
DPO (Rafailov et al., arXiv 2305.18290); the scale is that of NPO, which is this without a refusal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from expunge.data.rows import Row
from expunge.methods.base import Preset, RunDefaults
from expunge.methods.preference import REFUSAL, PreferenceSettings, check_refusal, refusing


@dataclass(frozen=True)
class IDKDPO(PreferenceSettings):
    """Settings of IDK with DPO."""

    refusal: str = REFUSAL
    """What is to be said in the place of every forget row's output."""

    name: ClassVar[str] = "idk-dpo"
    defaults: ClassVar[RunDefaults] = RunDefaults(epochs=10, batch_size=16, learning_rate=1e-3)
    presets: ClassVar[Mapping[str, Preset]] = {}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_refusal(self.refusal)

    def preferred(self, forget: Sequence[Row], retain: Sequence[Row], seed: int) -> Sequence[Row]:
        """The refusal after each row's input."""
        return refusing(forget, self.refusal)
