"""What a rehearsal has in the place of a model, of files of hidden states and of saved states."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from expunge.models import states
from expunge.models.loading import CheckedModel
from expunge.models.parts import StreamedModel
from expunge.models.states import StateFile
from expunge.models.tensors import StoredTensor
from expunge.training.metering import Meter

WEIGHTS = "weights"
OPTIMIZER = "optimiser state"
FILES = "model files, while they are read"
PAGES = "cached states, pages in memory"
CPU_KINDS = (FILES, PAGES)
"""What is in CPU memory wherever the model runs."""


class PlannedModel(StreamedModel):
    """Parameters that come and go as those of a streamed model do, without bytes."""

    def __init__(self, checked: CheckedModel, dtype: torch.dtype, meter: Meter) -> None:
        super().__init__(checked, dtype, "cpu")
        self._meter = meter
        self._mapped: list[torch.Tensor] = []

    def take_buffers(self) -> None:
        """Has the meter see the buffers too."""
        with self._meter.making(WEIGHTS):
            for module in self.model.modules():
                for name, buffer in module.named_buffers(recurse=False):
                    if buffer.is_floating_point():
                        module._buffers[name] = self._meter.empty(buffer.shape, buffer.dtype)

    def load_whole(self) -> None:
        """Brings everything into memory as from_pretrained does, tied parameters once.

        It maps a file as long as one of its tensors is in use: in the model where the dtype is the
        file's, and otherwise until all are converted.
        """
        self.streamed = False
        names: dict[str, list[str]] = {}
        for name, _ in self.model.named_parameters(remove_duplicate=False):
            # By name in the files: without bytes, tied parameters are tensors of their own.
            names.setdefault(self._names[name][0], []).append(name)
        files = []
        for stored_name, aliases in names.items():
            stored = self._stored[stored_name]
            read, value = self._converted(stored)
            files.append(read)
            for name in aliases:
                owner, _, leaf = name.rpartition(".")
                place = self.model.get_submodule(owner)._parameters
                place[leaf] = nn.Parameter(value, requires_grad=False)
                value = place[leaf]
        self._mapped = files
        self.unmap()

    def unmap(self) -> None:
        """Forgets the files where no parameter lies in them any more."""
        used = {p.untyped_storage()._cdata for p in self.model.parameters()}
        if not any(tensor.untyped_storage()._cdata in used for tensor in self._mapped):
            self._mapped = []

    def load(self, *modules: str) -> None:
        if self.streamed:
            super().load(*modules)

    def release(self, *modules: str) -> None:
        if self.streamed:
            super().release(*modules)
            self._meter.trim()

    def _read(self, stored: StoredTensor) -> torch.Tensor:
        return self._converted(stored)[1]

    def _converted(self, stored: StoredTensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is read and what becomes of it: the same, where dtype and place are."""
        same = stored.dtype == self._dtype and not self._meter.accelerator
        with self._meter.making(WEIGHTS if same else FILES):
            read = self._meter.empty(stored.shape, stored.dtype)
        if same:
            return read, read
        with self._meter.making(WEIGHTS):
            return read, self._meter.empty(stored.shape, self._dtype)


class PlannedStates(StateFile):
    """A file of hidden states that is not there."""

    def __init__(self, meter: Meter, tokens: int, width: int, dtype: torch.dtype) -> None:
        self._meter, self._width, self._dtype = meter, width, dtype
        self._size = max(1, tokens * width) * dtype.itemsize
        self._pages: torch.Tensor | None = None
        self._most = 0

    def write(self, _start: int, values: torch.Tensor) -> None:
        self._touch(values.numel())

    def read(self, spans: Sequence[tuple[int, int]]) -> torch.Tensor:
        tokens = sum(length for _, length in spans)
        self._touch(tokens * self._width)
        return self._meter.empty((tokens, self._width), self._dtype)

    def flush(self) -> None:
        pass

    def _touch(self, numbers: int) -> None:
        """Pages stay until so many have been touched, the last ones beyond that."""
        most = max(self._most, numbers * self._dtype.itemsize)
        if most > self._most:
            self._most = most
            pages = min(self._size, states._DROP_AFTER + most)
            with self._meter.making(PAGES):
                self._pages = self._meter.empty((pages,), torch.uint8)


class PlannedKeeper:
    """Learns from every state that would be saved what the loop's tensors are for."""

    stop_requested = False

    def __init__(self, meter: Meter, saved: Callable[[int], None]) -> None:
        self._meter, self._report = meter, saved

    def due(self, _step: int) -> bool:
        return True

    def save(self, _facts: Mapping[str, Any], groups: Mapping[str, Mapping[str, Any]]) -> None:
        for tensor in groups["optimizer"].values():
            self._meter.name(tensor, OPTIMIZER)
        tensors = [tensor for group in groups.values() for tensor in group.values()]
        self._report(sum(tensor.numel() * tensor.element_size() for tensor in tensors))
