"""The state of a run on disk, so that it can be stopped at any moment and continued.

One safetensors file holds tensors and, as metadata, facts in JSON. It is replaced as a whole, so that
there is always one; nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from expunge.models.tensors import metadata_of, read_tensor, stored_tensors, write_tensors

_FILE = "state.safetensors"


@dataclass(frozen=True)
class SavedState:
    """What a run goes on from."""

    facts: Mapping[str, Any]
    """What JSON can say: step, history, place in the metrics."""
    tensors: Mapping[str, torch.Tensor]

    def under(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors whose names begin with `prefix.`, without it."""
        start = f"{prefix}."
        return {
            name.removeprefix(start): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(start)
        }


def save_state(
    directory: Path, facts: Mapping[str, Any], groups: Mapping[str, Mapping[str, torch.Tensor]]
) -> None:
    """Writes the state in place of the last one. Raises OSError; the last one is then still there."""
    tensors = {
        f"{group}.{name}": tensor
        for group, members in groups.items()
        for name, tensor in members.items()
    }
    write_tensors(directory / _FILE, tensors, {"facts": json.dumps(facts)})


def load_state(directory: Path) -> SavedState | None:
    """The last state that was saved as a whole, or None."""
    facts = load_facts(directory)
    if facts is None:
        return None
    stored = stored_tensors(directory / _FILE)
    return SavedState(facts, {name: read_tensor(entry) for name, entry in stored.items()})


def load_facts(directory: Path) -> dict[str, Any] | None:
    """What JSON says of the last state, or None."""
    path = directory / _FILE
    if not path.is_file():
        return None
    facts: dict[str, Any] = json.loads(metadata_of(path)["facts"])
    return facts


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """An optimiser's state by `index.name`; every entry must be a tensor."""
    state: Mapping[int, Mapping[str, torch.Tensor]] = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": value for index, entry in state.items() for name, value in entry.items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Puts back what `optimizer_tensors` gave."""
    whole = optimizer.state_dict()
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**whole, "state": state})
