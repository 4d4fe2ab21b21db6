"""Weights spread over several processes (FSDP2), so that none has to hold the whole model.

A layer's weights are gathered while it runs. What is trained in full is spread with its gradient and its
momentum. An adapter put on afterwards is small: every process has all of it, with gradients summed as
for whole copies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from expunge.models.weights import train_only

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from expunge.models.decoder import DecoderLayout


def shard(model: PreTrainedModel, layout: DecoderLayout, trained: Sequence[str] = ()) -> None:
    """Spreads the model over the process group, layer by layer; in place.

    `trained` names what is trained in the layers, float32 from now on; the rest is frozen. The weights
    move to the device that the group works on. A backward pass leaves in each trained weight the sum of
    all processes' gradients.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model.requires_grad_(False)
    # Masters are gathered as the products take them, and their gradients summed in float32.
    policy = MixedPrecisionPolicy(
        param_dtype=model.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for index in range(layout.count):
        layer = layout.layer(model, index)
        place = f"{layout.layers}.{index}."
        train_only(layer, [n.removeprefix(place) for n in trained if n.startswith(place)])
        unit = fully_shard(layer, mp_policy=policy)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # gloo has no other
    fully_shard(model)


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether this process holds a part of the tensor only."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as a plain one; every process must ask for a sharded one."""
    if not is_sharded(tensor):
        return tensor
    # Where the group exchanges: a copy may be in the processor's memory.
    gathered: torch.Tensor = tensor.to(tensor.device_mesh.device_type).full_tensor()  # type: ignore[attr-defined]
    return gathered


def part_like(tensor: torch.Tensor, example: torch.Tensor, source: int | None = None) -> torch.Tensor:
    """A whole tensor, spread as `example` is.

    Process `source` has it and gives the others their parts; None: each has it and takes its own.
    """
    if not is_sharded(example):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = example.device_mesh, example.placements  # type: ignore[attr-defined]
    return distribute_tensor(tensor.to(example.device), mesh, placements, src_data_rank=source)


def sharers(tensor: torch.Tensor) -> int:
    """How many processes hold a part of the tensor."""
    return tensor.device_mesh.size() if is_sharded(tensor) else 1  # type: ignore[attr-defined]


def one_each(
    tensors: Sequence[torch.Tensor], change: Callable[[int, torch.Tensor], torch.Tensor]
) -> list[torch.Tensor]:
    """`change(index, tensor)` of each, spread as it is and of its shape and dtype.

    Sharded ones, as many as processes share them at most, are changed as a whole, by one process each:
    an operation of DTensors would exchange in every product, in the products' precision.
    """
    if not is_sharded(tensors[0]):
        return [change(index, tensor) for index, tensor in enumerate(tensors)]
    rank: int = tensors[0].device_mesh.get_local_rank()  # type: ignore[attr-defined]
    mine: torch.Tensor | None = None
    for owner, tensor in enumerate(tensors):
        gathered = whole(tensor)
        if owner == rank:
            mine = gathered
    # Only now, so that no process waits for another's change before it has its own to make.
    changed = None if mine is None else change(rank, mine)
    shared = []
    for owner, tensor in enumerate(tensors):
        given = changed if owner == rank else None
        if given is None:  # what is in it is not looked at
            given = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        shared.append(part_like(given, tensor, owner))
    return shared
