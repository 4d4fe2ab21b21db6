"""IDK with DPO: a refusal is preferred over the forget answer.

    L = -(2 / beta) * mean_F log sigmoid(beta * (log (pi / pi_ref)(refusal) - log (pi / pi_ref)(output)))
        + w * CE(retain)

given each row's input. The preference baseline of TOFU (Maini et al., arXiv 2401.06121, section 4), by
DPO (Rafailov et al., arXiv 2305.18290); the scale is that of NPO, which is this without a refusal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from expunge.methods.base import RunDefaults
from expunge.methods.preference import PreferenceSettings, RefusalSettings


@dataclass(frozen=True)
class IDKDPO(RefusalSettings, PreferenceSettings):
    """Settings of IDK with DPO."""

    name: ClassVar[str] = "idk-dpo"
    defaults: ClassVar[RunDefaults] = RunDefaults(epochs=10, batch_size=16, learning_rate=1e-3)
