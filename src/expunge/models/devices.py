"""On which device a model runs."""

from __future__ import annotations

import torch

from expunge.errors import InputError


def best_device() -> str:
    """The first accelerator, else the processor."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def resolve_device(device: str) -> str:
    """Turns `auto` into a device and refuses one that is not there."""
    if device == "auto":
        return best_device()
    try:
        found = torch.device(device)
        kind = found.type
    except RuntimeError:
        raise InputError(f"--device {device}: unknown; use auto, cpu, cuda or mps") from None
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available.get(kind, False):
        raise InputError(f"--device {device}: not available on this machine; use auto or cpu")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if found.index is not None and found.index >= count:
        raise InputError(f"--device {device}: unknown; this machine has {kind}:0 to {kind}:{count - 1}")
    return device
