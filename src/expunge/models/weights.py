"""Choosing what is trained, float32 masters, and running with the weights from before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn


def named_within(model: nn.Module, modules: Iterable[str]) -> list[str]:
    """Names of the parameters of some modules, in the model's order."""
    prefixes = tuple(f"{module}." for module in modules)
    return [name for name, _ in model.named_parameters() if name.startswith(prefixes)]


def train_only(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """Freezes the model but for the named parameters, which become float32 masters.

    In bfloat16 a step below 1/256 of a weight is lost to rounding (a trap of the published code).
    """
    model.requires_grad_(False)
    chosen: dict[str, nn.Parameter] = {}
    for name in names:
        parameter = model.get_parameter(name)
        if parameter.dtype != torch.float32:  # a sharded one may not be exchanged
            parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
        chosen[name] = parameter
    return chosen


def snapshot(parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A copy on the CPU."""
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in parameters.items()}


def restore(parameters: Mapping[str, nn.Parameter], state: Mapping[str, torch.Tensor]) -> None:
    """Writes a snapshot back."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])


@contextmanager
def swapped_in(
    parameters: Mapping[str, nn.Parameter], values: Mapping[str, torch.Tensor]
) -> Iterator[None]:
    """Runs the body, without gradients, with `values` in the place of the parameters.

    One model in memory serves as its own reference. Storage is exchanged, not copied, and put back
    whatever happens, so a graph recorded before stays valid.
    """
    current = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = values[name]
        with torch.no_grad():
            yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = current[name]
