"""A method on token probabilities after its weights were moved, beside the model as it was."""

from __future__ import annotations

from typing import Any

import torch

from conftest import tiny_model
from expunge.data.batches import collate
from expunge.maths.numerics import token_log_probs
from expunge.methods.base import Context, Terms


class Compared:
    """A started method after its weights were moved, beside a model that was left alone."""

    def __init__(self, method: Any, context: Context, vocabulary: int) -> None:
        self.original = tiny_model("olmo", vocabulary)
        self.objective = method.start(context)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.objective.parameters.values():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
        self.forget = collate(context.forget, [4, 1, 0], context.pad_id)
        self.retain = collate(context.retain, [0, 1, 2], context.pad_id)
        self.terms: Terms = self.objective.loss(self.forget, self.retain)

    def logits(self, side: str, *, before: bool) -> torch.Tensor:
        batch = getattr(self, side)
        if not before:
            return self.objective.logits(batch).detach()
        with torch.no_grad():
            return self.original(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits

    def log_probs(self, side: str, *, before: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        batch = getattr(self, side)
        logits = self.logits(side, before=before)
        return token_log_probs(logits, batch.input_ids), batch.token_mask[:, 1:]

    def counted(self, side: str, tokens: Any, *, before: bool = False) -> torch.Tensor:
        """Log-probabilities where a counted token is predicted, float64: (counted, vocabulary)."""
        mask = getattr(self, side).mask(tokens)[:, 1:]
        return self.logits(side, before=before)[:, :-1][mask].double().log_softmax(-1)
