"""Hidden states of rows in a memory-mapped file."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import torch

DROP_AFTER = 64 * 2**20


class StateFile:
    """An array (tokens, width) on disk, of which only what was touched lately is in memory."""

    def __init__(self, path: Path, tokens: int, width: int, dtype: torch.dtype) -> None:
        """Opens the file, or makes it; its blocks are reserved, so that a full disk shows here.

        Raises OSError.
        """
        size = max(1, tokens * width) * dtype.itemsize  # neither a map nor an array can be empty
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if os.fstat(descriptor).st_size != size:
                # Writing through a map into a hole of a full disk would kill the process.
                _reserve(descriptor, size)
            self._map = mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)
        self._array = torch.frombuffer(self._map, dtype=dtype)[: tokens * width]
        self._array = self._array.view(tokens, width)
        self._touched = 0

    def write(self, start: int, states: torch.Tensor) -> None:
        """Puts `states` (tokens, width) at token `start`."""
        self._array[start : start + len(states)].copy_(states)
        self._forget_pages(states.numel())

    def read(self, spans: Sequence[tuple[int, int]]) -> torch.Tensor:
        """The states of the spans (start, tokens), one after the other, in memory of their own."""
        states = torch.cat([self._array[start : start + length] for start, length in spans])
        self._forget_pages(states.numel())
        return states

    def flush(self) -> None:
        """Returns once everything is on the disk."""
        self._map.flush()

    def _forget_pages(self, numbers: int) -> None:
        """Gives pages back to the system's cache now and then; the data stays."""
        self._touched += numbers * self._array.dtype.itemsize
        if self._touched > DROP_AFTER and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
            self._touched = 0


def _reserve(descriptor: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:  # macOS
        os.ftruncate(descriptor, size)
