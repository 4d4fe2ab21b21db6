"""The state of a run on disk, so that it can be stopped at any moment and continued.

One safetensors file holds tensors and, as metadata, facts in JSON. It is replaced as a whole, so that
there is always one; nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from expunge.models.sharding import part_like
from expunge.models.tensors import (
    StoredTensor,
    metadata_of,
    read_tensor,
    stored_tensors,
    write_tensors,
)

_FILE = "state.safetensors"


class _Stored(Mapping[str, torch.Tensor]):
    """Tensors on disk, each read whenever it is asked for: all of them may be more than memory holds."""

    def __init__(self, entries: Mapping[str, StoredTensor]) -> None:
        self._entries = entries

    def __getitem__(self, name: str) -> torch.Tensor:
        return read_tensor(self._entries[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


@dataclass(frozen=True)
class SavedState:
    """What a run goes on from, as long as no other state takes its place."""

    facts: Mapping[str, Any]
    """What JSON can say: step, history, place in the metrics."""
    stored: Mapping[str, StoredTensor]

    def under(self, prefix: str) -> Mapping[str, torch.Tensor]:
        """The tensors whose names begin with `prefix.`, without it; each is read when asked for."""
        start = f"{prefix}."
        return _Stored(
            {
                name.removeprefix(start): entry
                for name, entry in self.stored.items()
                if name.startswith(start)
            }
        )


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
    return SavedState(facts, stored_tensors(directory / _FILE))


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
    return {f"{index}.{name}": value for index, entry in state.items() for name, value in entry.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Puts back what `optimizer_tensors` gave."""
    whole = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = part_like(value, parameters[int(index)])
    optimizer.load_state_dict({**whole, "state": state})
