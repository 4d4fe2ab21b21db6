"""The decoder as a list of layers, whatever the family calls its parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from expunge.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from expunge.data.batches import Batch

_MLP_OUTPUTS = ("mlp.down_proj", "mlp.dense_4h_to_h", "mlp.c_proj", "mlp.fc2", "fc2")
_LINEAR = ("Linear", "Conv1D")


@dataclass(frozen=True)
class DecoderLayout:
    """Where the layers of a decoder are, by dotted name."""

    layers: str
    count: int
    mlp_output: str
    """Name, inside a layer, of the projection that writes the MLP's result to the residual stream."""
    attention_linears: tuple[str, ...]
    mlp_linears: tuple[str, ...]

    def layer(self, model: nn.Module, index: int) -> nn.Module:
        """The module of one layer, counted from 0."""
        return model.get_submodule(f"{self.layers}.{index}")

    def mlp_output_weight(self, index: int) -> str:
        """Full name of the weight that the RMU family trains in one layer."""
        return f"{self.layers}.{index}.{self.mlp_output}.weight"

    def check_layer(self, index: int, lowest: int, option: str) -> None:
        """Raises InputError unless lowest <= index < count."""
        if not lowest <= index < self.count:
            raise InputError(
                f"{option} {index}: the model has the layers 0 to {self.count - 1};"
                f" choose {lowest} to {self.count - 1}"
            )


def find_layout(model: PreTrainedModel) -> DecoderLayout:
    """Finds the decoder's layers and their linear maps, by structure and by name.

    Works on a model on the meta device as well. Raises InputError that names an unsupported model.
    """
    family = model.config.model_type
    _refuse_encoder(model.config)
    depth = getattr(model.config, "num_hidden_layers", None)
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == depth
        and len({type(layer) for layer in module}) == 1
        and any("attn" in child or "attention" in child for child, _ in module[0].named_children())
    ]
    if len(lists) != 1:
        raise InputError(
            f"{family}: {len(lists)} lists of {depth} decoder layers found in"
            f" {type(model).__name__}, one is needed; this model is not supported"
        )
    name, layers = lists[0]
    linears = [
        child for child, module in layers[0].named_modules() if type(module).__name__ in _LINEAR
    ]
    outputs = [output for output in _MLP_OUTPUTS if output in linears]
    if not outputs or any(
        output not in dict(layer.named_modules()) for layer in layers for output in outputs[:1]
    ):
        raise InputError(
            f"{family}: its layers have no {' or '.join(_MLP_OUTPUTS)}"
            " (a mixture of experts?); this model is not supported"
        )
    attention = tuple(child for child in linears if "attn" in child or "attention" in child)
    return DecoderLayout(
        layers=name,
        count=len(layers),
        mlp_output=outputs[0],
        attention_linears=attention,
        mlp_linears=tuple(child for child in linears if child not in attention),
    )


def skeleton_of(config: PretrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model without weights, on the meta device: structure and names can be checked on it."""
    from transformers import AutoModelForCausalLM

    # Some have a causal class too, whose skeleton no longer says what it was cut from.
    _refuse_encoder(config)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError:
        raise InputError(
            f"{config.model_type}: has no causal language model in transformers;"
            " expunge supports decoder-only models"
        ) from None


def _refuse_encoder(config: PretrainedConfig) -> None:
    if config.is_encoder_decoder:
        raise InputError(
            f"{config.model_type}: is an encoder-decoder; expunge supports decoder-only models"
        )


class _LayerReached(Exception):
    """Ends a forward pass once the layer's output is in hand."""


def hidden_states(
    model: nn.Module, layout: DecoderLayout, layer: int, batch: Batch
) -> torch.Tensor:
    """The output of one decoder layer, (rows, tokens, width); no layer above it runs."""
    caught: list[torch.Tensor] = []

    def stop(_module: nn.Module, _inputs: object, output: object) -> None:
        caught.append(states_of(output))
        raise _LayerReached

    with forward_hook(layout.layer(model, layer), stop):
        try:
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        except _LayerReached:
            return caught[0]
    raise RuntimeError(f"layer {layer} did not run")


def states_of(output: Any) -> torch.Tensor:
    """What a decoder layer gives: its output, in older transformers the first of a tuple."""
    states: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return states


@contextmanager
def every_layer(model: nn.Module, layout: DecoderLayout) -> Iterator[list[torch.Tensor]]:
    """A pass in the body adds each layer's states, (rows, tokens, width), to the list in order."""
    caught: list[torch.Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: object) -> None:
        caught.append(states_of(output))

    with ExitStack() as stack:
        for layer in range(layout.count):
            stack.enter_context(forward_hook(layout.layer(model, layer), keep))
        yield caught


def with_states(output: Any, states: torch.Tensor) -> Any:
    """A decoder layer's output with other hidden states, in the form that it has."""
    return (states, *output[1:]) if isinstance(output, tuple) else states


@contextmanager
def forward_hook(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    """A forward hook that is removed whatever happens; what it returns replaces the output."""
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
