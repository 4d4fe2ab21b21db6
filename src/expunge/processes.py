"""One process, or several started by `accelerate launch` that share every step's rows."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from expunge.errors import InputError

if TYPE_CHECKING:
    import torch

Value = TypeVar("Value")
_PATIENCE = timedelta(hours=12)
"""Shares of the work end at different times, NCCL waits 10 minutes; who dies is the launcher's care."""


class Processes(Protocol):
    """The processes of a run; what they all must know is the same in each."""

    rank: int
    count: int

    @property
    def is_main(self) -> bool:
        """Whether this one writes files and speaks to the user."""

    @property
    def shards(self) -> bool:
        """Whether weights are spread over the processes (an FSDP configuration)."""

    def sum(self, tensors: Sequence[torch.Tensor]) -> None:
        """Adds each tensor over all processes, in place."""

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, by rank."""

    def wait(self) -> None:
        """Returns once all processes have come here."""


class OneProcess:
    """No others."""

    rank = 0
    count = 1
    is_main = True
    shards = False

    def sum(self, tensors: Sequence[torch.Tensor]) -> None:
        """Nothing to add."""

    def gather(self, value: Any) -> list[Any]:
        """The one value."""
        return [value]

    def wait(self) -> None:
        """Nobody to wait for."""


class ManyProcesses:
    """Those of Accelerate's process group: gloo on processors, NCCL on GPUs."""

    def __init__(self, device_type: str) -> None:
        from accelerate import PartialState

        self._state = PartialState(cpu=device_type == "cpu", timeout=_PATIENCE)
        self.rank: int = self._state.process_index
        self.count: int = self._state.num_processes
        self.device: torch.device = self._state.device

        self.shards = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")

    @property
    def is_main(self) -> bool:
        """Rank 0."""
        return self.rank == 0

    def sum(self, tensors: Sequence[torch.Tensor]) -> None:
        """One exchange for all tensors together."""
        import torch

        flat = torch.cat([tensor.detach().reshape(-1).float() for tensor in tensors])
        torch.distributed.all_reduce(flat)
        start = 0
        for tensor in tensors:
            end = start + tensor.numel()
            tensor.detach().copy_(flat[start:end].view_as(tensor))
            start = end

    def gather(self, value: Any) -> list[Any]:
        """Small values only: they are sent as objects."""
        import torch

        values: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """A barrier."""
        import torch

        torch.distributed.barrier()


def launched() -> int:
    """How many processes a launcher says that it started, this one among them; 1 without one."""
    said = os.environ.get("WORLD_SIZE", "1")
    return max(1, int(said)) if re.fullmatch("[0-9]{1,6}", said) else 1


def check_alone(command: str) -> None:
    """Raises InputError where several processes were started for what one does."""
    if launched() > 1:
        raise InputError(f"{command}: runs in one process; start it without accelerate launch")


def processes_of(device_type: str) -> Processes:
    """Those that `accelerate launch` or torchrun started, or this one alone.

    Raises InputError where others are counted and nothing says where they are.
    """
    count = launched()
    if count > 1 and "MASTER_ADDR" not in os.environ:
        raise InputError(
            f"WORLD_SIZE={count}: MASTER_ADDR is not set; unset it, or start with accelerate launch"
        )
    if count > 1:
        return ManyProcesses(device_type)
    return OneProcess()


def gathered(processes: Processes, found: Mapping[int, Value]) -> list[Value]:
    """What all processes found, in the order of its numbers; each number is of one process only."""
    everywhere = [item for share in processes.gather(dict(found)) for item in share.items()]
    return [value for _, value in sorted(everywhere, key=lambda item: item[0])]


@contextmanager
def refused_together(processes: Processes) -> Iterator[None]:
    """What the body refuses in one process is refused in all, before any of them goes on.

    Raises InputError. A file may be missing on one machine only, and the main process, which speaks,
    may be another's.
    """
    refusal: InputError | None = None
    try:
        yield
    except InputError as error:
        refusal = error
    said = [text for text in processes.gather(refusal and str(refusal)) if text is not None]
    if said:
        raise refusal or InputError(said[0]) from None
