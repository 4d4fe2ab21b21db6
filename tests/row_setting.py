"""A tiny model with rows, and slow references of their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from conftest import random_examples, shaken, tiny_model
from expunge.analysis.row_gradients import RowGradients, Windows, linear_maps
from expunge.data.tokenization import Example
from expunge.models.decoder import find_layout

VOCABULARY = 50


@dataclass(frozen=True)
class Setting:
    """A model, its maps and rows."""

    model: Any
    maps: dict[str, torch.nn.Module]
    rows: Sequence[Windows]

    def passes(self, batch_size: int = 3) -> RowGradients:
        return RowGradients(self.model, self.maps, pad_id=0, batch_size=batch_size)

    def weights(self, name: str) -> list[torch.nn.Parameter]:
        """A map's weight, and its bias if there is one."""
        module = self.maps[name]
        bias = getattr(module, "bias", None)
        return [module.get_parameter("weight"), *([] if bias is None else [bias])]

    def loss(self, row: Windows) -> torch.Tensor:
        """The summed loss of a row's counted tokens, window by window."""
        total = torch.zeros(())
        for window in row:
            ids = torch.tensor(window.input_ids)[None]
            log_probs = self.model(input_ids=ids).logits[0].log_softmax(-1)
            for place in range(1, len(window)):
                if window.token_mask[place]:
                    total = total - log_probs[place - 1, window.input_ids[place]]
        return total

    def gradient(self, row: Windows) -> dict[str, torch.Tensor]:
        """By autograd, (out, in), the bias as a last column."""
        names = list(self.maps)
        weights = [weight for name in names for weight in self.weights(name)]
        for weight in weights:
            weight.requires_grad_(True)
        found = iter(torch.autograd.grad(self.loss(row), weights))
        gradients = {}
        for name in names:
            parts = [next(found) for _ in self.weights(name)]
            columns = [part if part.ndim == 2 else part[:, None] for part in parts]
            gradients[name] = torch.cat(columns, dim=1)
        return gradients


def make_setting(family: str = "olmo", lengths: Sequence[int] = (9, 5, 7, 6, 8)) -> Setting:
    model = shaken(tiny_model(family, VOCABULARY, layers=2))
    rows: list[list[Example]] = [[example] for example in random_examples(lengths, VOCABULARY)]
    return Setting(model, linear_maps(model, find_layout(model), 0, 1), rows)
