"""What writing needs of a disk: a directory that can be written to, and bytes that are on it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from expunge.errors import InputError

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".model")
_OF_A_MODEL = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "model.safetensors.index.json", "expunge.json", "metrics.jsonl",
)  # fmt: skip
_ROWS = (".csv", ".parquet", ".jsonl")


def settle(path: Path) -> None:
    """Returns once a file, or a directory's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def nearest(path: Path) -> Path:
    """The path itself where it exists, or the first above it that does."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def check_file_output(option: str, path: Path, read: Mapping[str, str | None]) -> None:
    """Raises InputError where no file can be written there, or one that is read would be replaced.

    `read` holds the paths of what is read, by the option that names it.
    """
    if not path.absolute().parent.is_dir():
        raise InputError(f"--{option} {path}: its directory does not exist; make it first")
    if path.is_dir():
        raise InputError(f"--{option} {path}: is a directory; name a file")
    if path.exists() and (path.suffix in _WEIGHTS or path.name in _OF_A_MODEL):
        raise InputError(
            f"--{option} {path}: is there, and has the name of a model's or a run's own file; name"
            " another file"
        )
    for other, given in read.items():
        if given is None or not path.exists():
            continue
        place = Path(given).resolve()
        is_inside = place.is_dir() and place in path.resolve().parents
        if path.resolve() == place or (is_inside and path.suffix in _ROWS):
            raise InputError(f"--{option} {path}: is what --{other} reads; name another file")


def check_writable(output: Path, *, inside: bool = False, option: str = "--output") -> None:
    """Raises InputError where the output cannot be made or, `inside`, nothing can be put into it."""
    place = nearest(output if inside else output.absolute().parent)
    if not place.is_dir():
        raise InputError(f"{option} {output}: {place} is a file; choose another place")
    if not os.access(place, os.W_OK):
        raise InputError(f"{option} {output}: {place} cannot be written to; choose another place")
