"""Frozen weights spread over several processes (FSDP2), so that none has to hold the whole model.

Only what is frozen is sharded: an adapter put on afterwards is small, and every process has all of
it, with gradients summed as for whole copies. A layer's weights are gathered while it runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from expunge.models.decoder import DecoderLayout

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def shard_frozen(model: PreTrainedModel, layout: DecoderLayout) -> None:
    """Freezes the model and spreads it over the process group, layer by layer; in place.

    The weights move to the device that the group works on.
    """
    from torch.distributed.fsdp import fully_shard

    model.requires_grad_(False)
    for index in range(layout.count):
        fully_shard(layout.layer(model, index))
    fully_shard(model)


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether this process holds a part of the tensor only."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A weight as a plain tensor; every process must ask for a sharded one."""
    gathered: torch.Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return gathered
