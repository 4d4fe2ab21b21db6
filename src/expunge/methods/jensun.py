"""JensUn: Jensen-Shannon divergence to a refusal on forget text, to the target on retain text.

    L = mean_F JSD(onehot(r_t) || p_t) + w * mean_R JSD(p_t_before || p_t)

At the t-th counted token of a forget row, given the row's own tokens before it, r_t is the t-th token of
the refusal and its EOS, which are repeated as long as the row goes on. Both terms lie in [0, log 2].
Singh et al., arXiv 2509.02820. The published code marks all tokens of the refusal at every place, each
with mass 1; here there is one at a place, so that it is a distribution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from expunge.data.batches import Batch, Tokens
from expunge.maths.losses import certain_jsd, token_jsd
from expunge.maths.numerics import target_log_probs
from expunge.methods.base import Context, RunDefaults, Terms
from expunge.methods.gradient import GradientObjective
from expunge.methods.preference import RefusalSettings


@dataclass(frozen=True)
class JensUn(RefusalSettings):
    """Settings of JensUn."""

    tokens: Tokens = "content"
    """Which tokens the losses count: all, the output given the input, or of questions the output."""
    retain_weight: float = 1.0
    """Weight of the retain term."""

    name: ClassVar[str] = "jensun"
    defaults: ClassVar[RunDefaults] = RunDefaults(epochs=10, batch_size=16, learning_rate=1e-3)

    def start(self, context: Context) -> JensUnObjective:
        """Makes the weights trainable and keeps the reference."""
        return JensUnObjective(self, context)


class JensUnObjective(GradientObjective):
    """JensUn at work on one model."""

    def __init__(self, settings: JensUn, context: Context) -> None:
        super().__init__(settings, context, needs_reference=settings.retain_weight > 0)
        self._weight = settings.retain_weight
        self._refusals: dict[str, list[int]] = {}
        for e in context.preferred:  # of a row's windows the first ones have no answer
            ids = [i for i, counts in zip(e.input_ids, e.answer_mask, strict=True) if counts]
            self._refusals[e.row_id] = max(self._refusals.get(e.row_id, []), ids, key=len)

    def loss(self, forget: Batch, retain: Batch | None) -> Terms:
        """Both terms of L."""
        wanted = self._wanted(forget)
        away = certain_jsd(target_log_probs(self.counted_logits(forget), wanted))
        term = away.sum() / max(1, len(away))
        if retain is None or self._weight == 0:
            return Terms(term, None)
        with self.reference():
            before = self.counted_logits(retain)
        drift = token_jsd(self.counted_logits(retain), before)
        return Terms(term, self._weight * drift.sum() / max(1, len(drift)))

    def _wanted(self, forget: Batch) -> torch.Tensor:
        """The refusals' tokens at the counted places, row by row: (counted tokens,)."""
        counts = forget.mask(self._tokens)[:, 1:].sum(1).tolist()
        refusals = (self._refusals[row] for row in forget.row_ids)
        ids = [
            refusal[place % len(refusal)]
            for refusal, count in zip(refusals, counts, strict=True)
            for place in range(count)
        ]
        return torch.tensor(ids, dtype=torch.long, device=forget.input_ids.device)
