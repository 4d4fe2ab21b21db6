"""expunge.json: what was run, on what, with which result."""

from __future__ import annotations

import math
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

import expunge
from expunge.data.fingerprints import data_fingerprint, handed_out
from expunge.data.formats import sha256_of
from expunge.data.rows import RowSet
from expunge.methods.base import Method
from expunge.training.unlearning import Outcome

_LIBRARIES = ("torch", "transformers", "accelerate", "peft", "safetensors", "tokenizers")


def finite(value: Any) -> Any:
    """The same with null for numbers that JSON has no word for."""
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def settings_of(method: Method) -> dict[str, Any]:
    """A method's name and settings."""
    return {"name": method.name, **asdict(method)}  # type: ignore[call-overload]


def describe_run(
    inputs: Mapping[str, Any],
    method: Method,
    preset: str | None,
    sets: Mapping[str, RowSet],
    outcome: Outcome,
    device: str,
) -> dict[str, Any]:
    """All of the manifest that is known before the result is written."""
    history = outcome.history
    return {
        "status": "complete",
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "expunge": expunge.__version__,
        "settings": {
            "inputs": {**handed_out(inputs), "output": Path(inputs["output"]).absolute().name},
            "method": settings_of(method),
            "preset": preset,
            "preset_source": None if preset is None else method.presets[preset].source,
            "training": handed_out(outcome.options),
        },
        "seed": outcome.options["seed"],
        "rows": {name: len(rows) for name, rows in sets.items()},
        "rows_read": {name: dict(rows.read) for name, rows in sets.items()},
        "data_hmac_sha256": {name: data_fingerprint(rows) for name, rows in sets.items()},
        "device": device,
        "environment": environment(),
        "method_notes": dict(outcome.notes),
        "steps": history.steps,
        "selection": history.describe(),
        "seconds": dict(outcome.seconds),
        "peak_memory_bytes": _peak_memory(device),
        "warnings": list(outcome.warnings),
    }


def environment() -> dict[str, Any]:
    """Versions, machine and the state of the checkout that the package runs from."""
    return {
        "python": platform.python_version(),
        "libraries": {library: version(library) for library in _LIBRARIES},
        "machine": platform.machine(),
        "cpu_count": psutil.cpu_count(logical=False),
        "memory_bytes": psutil.virtual_memory().total,
        "git": _git_state(),
    }


def _git_state() -> dict[str, Any] | None:
    """Commit of the package's checkout and whether it has changes; null for an installed wheel."""
    package = Path(expunge.__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(package), *arguments], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    return {"commit": git("rev-parse", "HEAD"), "changes": bool(git("status", "--porcelain"))}


def _peak_memory(device: str) -> dict[str, int]:
    import resource

    import torch

    unit = 1 if platform.system() == "Darwin" else 1024
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.startswith("cuda"):
        peak["device"] = torch.cuda.max_memory_allocated()
    return peak


def digests(directory: Path) -> dict[str, str]:
    """SHA-256 of every file of a directory, by name."""
    return {path.name: sha256_of(path) for path in sorted(directory.iterdir()) if path.is_file()}
