"""Some consecutive layers of a decoder, run on packed rows from the states below them.

A shallow copy of the model with its list of layers cut to the segment runs whatever the family does
around its layers (rotary embeddings, masks by layer type) without code for any family. Whether it
gives what the whole model gives is measured before it is used.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from expunge.models.decoder import DecoderLayout, forward_hook, states_of
from expunge.segments.packing import NotASegment, packed, positions_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Segment:
    """Layers `first` to `last`, both included, of a model; it shares the model's parameters."""

    def __init__(self, model: PreTrainedModel, layout: DecoderLayout, first: int, last: int) -> None:
        """Raises NotASegment where the layers are not a direct child of the base model.

        `first` > `last` is the empty segment, which hands on the embeddings.
        """
        prefix = model.base_model_prefix
        path = layout.layers.removeprefix(f"{prefix}.").split(".")
        if not layout.layers.startswith(f"{prefix}.") or len(path) != 1:
            raise NotASegment(f"its layers are at {layout.layers}")
        self._config = model.config
        self._base = _shallow(model.base_model)
        layers = getattr(model.base_model, path[0])
        chosen = nn.ModuleList()
        chosen._modules = {str(i - first): layers[i] for i in range(first, last + 1)}
        self._base._modules[path[0]] = chosen
        self._base.config = _cut(model.config, first, last)
        self._last = layers[last] if last >= first else model.get_input_embeddings()
        self._model = _shallow(model)
        self._model._modules[prefix] = self._base

    def from_ids(self, ids: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Output of the last layer for token ids (tokens,), where the first is the model's first."""
        return self._run({"input_ids": ids[None]}, lengths)

    def __call__(self, states: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Output of the last layer, (tokens, width), for the states (tokens, width) below."""
        return self._run({"inputs_embeds": states[None]}, lengths)

    def logits(self, states: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """(tokens, vocabulary), where the last layer is the model's last."""
        with packed(self._config, lengths):
            outputs = self._model(inputs_embeds=states[None], **_arguments(lengths, states.device))
        return outputs.logits[0]

    def _run(self, given: dict[str, torch.Tensor], lengths: Sequence[int]) -> torch.Tensor:
        caught: list[torch.Tensor] = []

        def stop(_module: nn.Module, _inputs: object, output: object) -> None:
            caught.append(states_of(output))
            raise _Done

        device = next(iter(given.values())).device
        with packed(self._config, lengths), forward_hook(self._last, stop):
            try:
                self._base(**given, **_arguments(lengths, device))
            except _Done:
                return caught[0][0]
        raise RuntimeError("the last layer did not run")


class _Done(Exception):
    """Ends a forward pass behind the last layer."""


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm of the difference in units of the expected tensor's."""
    difference = (found.float() - expected.float()).norm()
    return float(difference / expected.float().norm().clamp(min=1e-30))


def _arguments(lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    return {
        "position_ids": positions_of(lengths, device)[None],
        # transformers takes a mask of four dimensions as it is, and packed attention needs none.
        "attention_mask": torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device),
        "use_cache": False,
    }


def _shallow(module: Any) -> Any:
    """A copy whose children can be exchanged; parameters, buffers and children are shared."""
    shallow = copy.copy(module)
    shallow._modules = dict(module._modules)
    return shallow


def _cut(config: Any, first: int, last: int) -> Any:
    """The configuration of a model that has the segment's layers only."""
    cut = copy.copy(config)
    cut.num_hidden_layers = last - first + 1
    if getattr(config, "layer_types", None):
        cut.layer_types = list(config.layer_types[first : last + 1])
    return cut
