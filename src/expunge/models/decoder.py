"""The decoder as a list of layers, whatever the family calls its parts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from expunge.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from expunge.data.batches import Batch

Targets = Literal["attention", "mlp", "all"]
_MLP = re.compile(r"mlp|ffn|feed_forward|^ff\b|^fc\d")
SUPPORTED = "give a decoder-only model of a family in docs/models.md"
_EXPERTS = re.compile(r"expert|moe")
_CROSS = re.compile(r"cross_?attn|cross_?attention|encoder_attn")
_SENSES = re.compile(r"vision|audio|image")


@dataclass(frozen=True)
class DecoderLayout:
    """Where the layers of a decoder are, by dotted name."""

    layers: str
    count: int
    width: int
    """Size of the residual stream."""
    mlp_output: str
    """Name, inside a layer, of the projection that writes the MLP's result to the residual stream.

    Empty where the layers have none in common.
    """
    attention_linears: tuple[str, ...]
    """Full names of the linear maps that mix tokens: of attention, convolutions, recurrences."""
    mlp_linears: tuple[str, ...]
    """Full names of those of the MLPs."""

    def layer(self, model: nn.Module, index: int) -> nn.Module:
        """The module of one layer, counted from 0."""
        return model.get_submodule(f"{self.layers}.{index}")

    def linears(self, targets: Targets = "all", layers: Iterable[int] | None = None) -> list[str]:
        """Full names of the linear maps of a kind in some layers, or all; layer by layer."""
        kinds = {"attention": self.attention_linears, "mlp": self.mlp_linears}
        chosen = [*kinds.values()] if targets == "all" else [kinds[targets]]
        return [
            name
            for index in (range(self.count) if layers is None else layers)
            for names in chosen
            for name in names
            if name.startswith(f"{self.layers}.{index}.")
        ]

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

    def check_mlp_output(self, user: str) -> None:
        """Raises InputError where the layers have no MLP output in common, which `user` needs."""
        if not self.mlp_output:
            raise InputError(
                f"{user}: the model's layers have no MLP output in common; unlearn it with --method"
                " spectral or libu, which need none"
            )


def find_layout(model: PreTrainedModel) -> DecoderLayout:
    """Finds the decoder's layers and their linear maps, by structure, shape and place.

    Works on a model on the meta device as well. Raises InputError that names an unsupported model.
    """
    config = model.config
    family = config.model_type
    _refuse_others(config)
    if _is_multimodal(config):
        raise InputError(f"{family}: is multimodal; {SUPPORTED}")
    depth = getattr(config, "num_hidden_layers", None)
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == depth
        and all(_linears(layer) for layer in module)
    ]
    if len(lists) != 1:
        raise InputError(
            f"{family}: {len(lists)} lists of {depth} decoder layers found in"
            f" {type(model).__name__}, one is needed; {SUPPORTED}"
        )
    name, layers = lists[0]
    if "encoder" in name.split(".") and getattr(config, "is_decoder", None) is False:
        raise InputError(f"{family}: is an encoder; {SUPPORTED}")
    if any(_EXPERTS.search(parameter) for parameter, _ in layers.named_parameters()) or any(
        _has_experts(layer, config.hidden_size) for layer in layers
    ):
        raise InputError(f"{family}: is a mixture of experts; {SUPPORTED}")
    if any(_CROSS.search(parameter) for parameter, _ in layers.named_parameters()):
        raise InputError(f"{family}: attends to another model's states; {SUPPORTED}")
    mlps: list[str] = []
    attention: list[str] = []
    outputs: list[list[str]] = []
    seen: set[nn.Module] = set()
    for index, layer in enumerate(layers):
        # What several layers share is one map, known by its first name.
        found = {child: map_ for child, map_ in _linears(layer).items() if map_ not in seen}
        seen.update(found.values())
        inside = [child for child in found if _MLP.search(child)]
        mlps += [f"{name}.{index}.{child}" for child in inside]
        attention += [f"{name}.{index}.{child}" for child in found if child not in inside]
        outputs.append([child for child in inside if map_sizes(found[child])[0] == config.hidden_size])
    if not attention:
        raise InputError(f"{family}: its layers mix tokens without linear maps; {SUPPORTED}")
    common = [child for child in outputs[0] if all(child in others for others in outputs)]
    if hasattr(config, "altup_num_inputs"):  # Gemma 3n's layers hand on several streams, not one
        common = []
    return DecoderLayout(
        layers=name,
        count=len(layers),
        width=config.hidden_size,
        mlp_output=common[-1] if common else "",
        attention_linears=tuple(attention),
        mlp_linears=tuple(mlps),
    )


def _linears(layer: nn.Module) -> dict[str, nn.Module]:
    """The linear maps inside a module, by name."""
    from transformers.pytorch_utils import Conv1D

    return {
        name: module
        for name, module in layer.named_modules()
        if name and isinstance(module, nn.Linear | Conv1D)
    }


def _has_experts(layer: nn.Module, width: int) -> bool:
    """Whether a map of the stream gives a number for each of several stacks of weights, as a router's.

    Stacks are modules in a list, or the matrices of one parameter of three dimensions.
    """
    counts = {
        len(module)
        for module in layer.modules()
        if isinstance(module, nn.ModuleList) and all(_linears(each) for each in module)
    }
    kernels = (nn.Conv1d, nn.Conv2d)
    counts |= {
        parameter.shape[0]
        for module in layer.modules()
        for parameter in module.parameters(recurse=False)
        if parameter.dim() == 3 and not isinstance(module, kernels)
    }
    shapes = {tuple(parameter.shape) for parameter in layer.parameters()}
    return any((count, width) in shapes for count in counts if count > 1)


def is_turned(linear: nn.Module) -> bool:
    """Whether a linear map holds its weight as (in, out), as GPT-2's do."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(linear, Conv1D)


def map_sizes(linear: nn.Module) -> tuple[int, int]:
    """How many outputs and how many inputs a linear map has."""
    rows, columns = linear.get_parameter("weight").shape
    return (columns, rows) if is_turned(linear) else (rows, columns)


def skeleton_of(config: PretrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model without weights, on the meta device: structure and names can be checked on it."""
    from transformers import AutoModelForCausalLM

    # Some have a causal class too, whose skeleton no longer says what it was cut from.
    _refuse_others(config)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError:
        what = "is multimodal" if _is_multimodal(config) else "has no causal language model"
        raise InputError(f"{config.model_type}: {what} in transformers; {SUPPORTED}") from None


def _is_multimodal(config: PretrainedConfig) -> bool:
    """Some have a causal class for their text alone, whose configuration is the text's."""
    parts = " ".join(config.sub_configs)
    return config.get_text_config(decoder=True) is not config or bool(_SENSES.search(parts))


def _refuse_others(config: PretrainedConfig) -> None:
    if config.is_encoder_decoder:
        raise InputError(f"{config.model_type}: is an encoder-decoder; {SUPPORTED}")


class _LayerReached(Exception):
    """Ends a forward pass once the layer's output is in hand."""


def hidden_states(model: nn.Module, layout: DecoderLayout, layer: int, batch: Batch) -> torch.Tensor:
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
    """What a decoder layer gives: its output, in some families the first of several."""
    states: torch.Tensor = output[0] if isinstance(output, tuple | list) else output
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


@contextmanager
def last_layer_gives(model: nn.Module, layout: DecoderLayout, states: torch.Tensor) -> Iterator[None]:
    """Passes in the body end in what the model does behind its last layer, done to `states`.

    They take the place of what the layers compute, (rows, tokens, width), so that no family's final
    norm, cap or scale has to be known.
    """

    def exchange(_module: nn.Module, _inputs: object, output: object) -> object:
        return with_states(output, states)

    with forward_hook(layout.layer(model, layout.count - 1), exchange):
        yield


def with_states(output: Any, states: torch.Tensor) -> Any:
    """A decoder layer's output with other hidden states, in the form that it has."""
    return type(output)((states, *output[1:])) if isinstance(output, tuple | list) else states


@contextmanager
def forward_hook(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    """A forward hook that is removed whatever happens; what it returns replaces the output."""
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
