"""Low-rank adapters through PEFT: injected in place, switched off as reference, merged in float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from expunge.errors import InputError
from expunge.models.decoder import DecoderLayout, Targets, is_turned
from expunge.models.sharding import is_sharded, whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ADAPTER = "default"


@dataclass(frozen=True)
class LoraShape:
    """Size and place of the adapter; scaling is alpha / rank (arXiv 2106.09685)."""

    rank: int
    alpha: float
    dropout: float
    targets: Targets
    layers: tuple[int, ...] | None = None
    """Decoder layers that are adapted; None: all."""


class Adapter:
    """LoRA on a model's decoder layers. The embeddings and the LM head are never adapted."""

    def __init__(
        self, model: PreTrainedModel, layout: DecoderLayout, shape: LoraShape, seed: int
    ) -> None:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        targets = layout.linears(shape.targets, shape.layers)
        self.config = LoraConfig(
            r=shape.rank,
            lora_alpha=shape.alpha,
            lora_dropout=shape.dropout,
            target_modules=targets,
            fan_in_fan_out=is_turned(model.get_submodule(targets[0])),
            task_type="CAUSAL_LM",
        )
        self._model = model
        model.requires_grad_(False)
        # PEFT draws A from the global generator.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                inject_adapter_in_model(self.config, model)
            except ValueError as error:
                raise InputError(
                    f"{model.config.model_type}: takes no low-rank adapter on its {shape.targets} maps"
                    f" ({str(error).partition('. ')[0]}); choose --method spectral"
                ) from None
        self.layers: dict[str, Any] = {
            name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)
        }
        self.parameters: dict[str, nn.Parameter] = {}
        for name, layer in self.layers.items():
            for factor in ("lora_A", "lora_B"):
                parameter = getattr(layer, factor)[_ADAPTER].weight
                parameter.data = parameter.data.float()
                self.parameters[f"{name}.{factor}.weight"] = parameter.requires_grad_(True)
        self.moves_first = [name for name in self.parameters if "lora_B" in name]
        """Parameters that have a gradient in the first step: with B = 0 there is none in A."""
        self.set_dropout(False)  # new modules are born in training mode

    @contextmanager
    def using(self, factors: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """Runs the body with other factors of the same shapes, by the names of `parameters`."""
        try:
            for name, module in self.factors():
                module.weight = factors[name]
            yield
        finally:
            for name, module in self.factors():
                module.weight = self.parameters[name]

    def factors(self) -> Iterator[tuple[str, nn.Module]]:
        """The two linear maps of every adapted layer, by the name of their parameter."""
        for name, layer in self.layers.items():
            for factor in ("lora_A", "lora_B"):
                yield f"{name}.{factor}.weight", getattr(layer, factor)[_ADAPTER]

    def set_dropout(self, active: bool) -> None:
        """Dropout on for training steps, off for Fisher, validation and reference passes."""
        for layer in self.layers.values():
            layer.lora_dropout.train(active)

    @contextmanager
    def off(self) -> Iterator[None]:
        """The model as it was before unlearning, without gradients."""
        try:
            for layer in self.layers.values():
                layer.enable_adapters(False)
            with torch.no_grad():
                yield
        finally:
            for layer in self.layers.values():
                layer.enable_adapters(True)
                for factor in ("lora_A", "lora_B"):
                    getattr(layer, factor)[_ADAPTER].weight.requires_grad_(True)

    @torch.no_grad()
    def merge(self, *, keep: bool = True) -> dict[str, torch.Tensor]:
        """Adds the adapter to the weights in float32, takes it out of the model, returns the sums.

        Each weight of the model is cast to its dtype once; the returned tensors are float32. Sharded
        weights stay as they were, and only a process that keeps the sums has them.
        Raises ValueError where a sum is not finite.
        """
        merged = {}
        for name, layer in self.layers.items():
            base = layer.get_base_layer()
            total = whole(base.weight.data).float() + layer.get_delta_weight(_ADAPTER).float()
            if not torch.isfinite(total).all():
                raise ValueError(f"{name}: the merged weight is not finite")
            if keep:
                merged[f"{name}.weight"] = total.cpu()
            if not is_sharded(base.weight):
                base.weight.data = total.to(base.weight.dtype)
        self.take_out()
        return merged

    def take_out(self) -> None:
        """Leaves the model plain, its weights as they are."""
        for name, layer in self.layers.items():
            self._model.set_submodule(name, layer.get_base_layer())
        del self._model.peft_config  # left by the injection; a second adapter would find it

    def state(self) -> dict[str, torch.Tensor]:
        """The adapter in the names of PEFT's own adapter files."""
        return {
            f"base_model.model.{name}": parameter.detach().cpu().clone()
            for name, parameter in self.parameters.items()
        }
