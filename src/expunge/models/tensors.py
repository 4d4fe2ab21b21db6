"""Single tensors of a safetensors file, read, written and replaced without a second copy in memory.

The library maps a shard as a whole, which a limit on address space forbids for a model larger than
it, and it cannot replace one tensor. The format is eight bytes of header length, a JSON header and
the tensors' bytes (github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from expunge.disk import settle, whole
from expunge.errors import InputError, RunError
from expunge.models.sharding import whole as gathered

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class LowRank:
    """scale * B @ A, what a LoRA adapter adds to a weight; transposed where the weight is (in, out)."""

    a: StoredTensor
    """(rank, in)"""
    b: StoredTensor
    """(out, rank)"""
    scale: float
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's."""
        shape = (self.b.shape[0], self.a.shape[1])
        return shape[::-1] if self.transposed else shape

    def delta(self) -> torch.Tensor:
        """In float32, in the weight's shape."""
        product = self.scale * (read_tensor(self.b).float() @ read_tensor(self.a).float())
        return product.T if self.transposed else product


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor's bytes are."""

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Offset of its first byte in the file."""
    bytes: int
    added: LowRank | None = None
    """What is added as it is read, in float32, before the sum is cast to `dtype`."""


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a safetensors file by name; only the header is read.

    Raises InputError for a file that the library does not open, and for dtypes of quantised weights.
    """
    try:
        # Under a limit on address space it opens nothing; the sizes below must do then.
        with suppress(OSError, MemoryError), safe_open(path, framework="pt"):
            pass
        header, start = _header(path)
        ends = [entry["data_offsets"][1] for entry in header.values()]
        whole = path.stat().st_size == start + max(ends, default=0)
        found = {name: _stored(path, name, entry, start) for name, entry in header.items()}
    except InputError:
        raise
    except Exception as error:  # the library's own, and many of a header that it could not check
        raise InputError(
            f"{path}: is not a whole safetensors file ({error}); save or fetch it again"
        ) from None
    if not whole:
        raise InputError(
            f"{path}: is not a whole safetensors file (its size is not its header's); save it again"
        )
    return found


def _stored(path: Path, name: str, entry: Mapping[str, Any], start: int) -> StoredTensor:
    if entry["dtype"] not in _DTYPES:
        raise InputError(
            f"{path}: tensor {name} has the dtype {entry['dtype']}; give a"
            " checkpoint in float32, bfloat16 or float16"
        )
    dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if begin < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"tensor {name} has not the size of its shape")
    return StoredTensor(path, name, dtype, shape, start + begin, end - begin)


def metadata_of(path: Path) -> dict[str, str]:
    """The free entries of a safetensors file's header."""
    return _whole_header(path)[0].get("__metadata__", {})


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file tensor by tensor, whole or not at all.

    The library's own function holds a second copy of all of them. Of sharded ones one at a time is
    gathered. Raises OSError.
    """
    names = {dtype: name for name, dtype in _DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with whole(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors.values():
            file.write(_raw(gathered(tensor).detach().to("cpu").contiguous()))


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The description of each tensor, and the offset of the first one's bytes."""
    header, start = _whole_header(path)
    header.pop("__metadata__", None)
    return header, start


def _whole_header(path: Path) -> tuple[dict[str, Any], int]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError("its header is longer than the file")
        header = json.loads(file.read(length))
    return header, 8 + length


def read_tensor(stored: StoredTensor) -> torch.Tensor:
    """The tensor with what is added to it, in memory of its own."""
    tensor = torch.empty(stored.shape, dtype=stored.dtype)
    if stored.bytes:
        view = _raw(tensor)
        with stored.path.open("rb", buffering=0) as file:
            file.seek(stored.start)
            done = 0
            while done < stored.bytes:
                read = file.readinto(view[done:])
                if not read:
                    raise RunError(f"{stored.path}: ends before its tensors do; fetch it again")
                done += read
    if stored.added is not None:
        tensor = (tensor.float() + stored.added.delta()).to(stored.dtype)
    return tensor


def check_finite(value: torch.Tensor, stored: StoredTensor) -> None:
    """Raises InputError that names the stored tensor where its `value` has NaN or infinity."""
    if value.numel() and not torch.isfinite(torch.stack(value.aminmax())).all():
        dtype = str(value.dtype).removeprefix("torch.")
        raise InputError(
            f"{stored.path}: tensor {stored.name} holds NaN or infinity in {dtype}; give a checkpoint"
            f" without{' or --dtype float32' if value.dtype != torch.float32 else ''}"
        )


def overwrite_tensor(stored: StoredTensor, tensor: torch.Tensor) -> None:
    """Writes `tensor` over the stored one; every other byte of the file stays."""
    if tensor.dtype != stored.dtype or tuple(tensor.shape) != stored.shape:
        raise ValueError(f"{tensor.dtype} {tuple(tensor.shape)} for {stored}")
    with stored.path.open("r+b") as file:
        file.seek(stored.start)
        file.write(_raw(tensor.detach().to("cpu").contiguous()))
    settle(stored.path)


def _raw(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, not a copy of them."""
    array: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(array)
