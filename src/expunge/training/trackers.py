"""Experiment trackers, through Accelerate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Log = Callable[[Mapping[str, Any]], None]


@contextmanager
def tracked(
    trackers: Sequence[str],
    settings: Mapping[str, Any],
    directory: Path | None,
    log: Log,
) -> Iterator[Log]:
    """Gives a log that writes to `log` and to every tracker; numbers only, never text of a row."""
    from accelerate import Accelerator

    accelerator = Accelerator(
        log_with=list(trackers), project_dir=None if directory is None else str(directory)
    )
    accelerator.init_trackers("expunge", config=_flat(settings))

    def both(entry: Mapping[str, Any]) -> None:
        log(entry)
        numbers = {k: v for k, v in _flat(entry).items() if isinstance(v, int | float)}
        accelerator.log(numbers, step=entry.get("step"))

    try:
        yield both
    finally:
        accelerator.end_training()


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted names, with what trackers cannot store written as text."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, int | float | str) else str(value)
    return flat
