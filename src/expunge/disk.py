"""What writing needs of a disk: a directory that can be written to, and bytes that are on it."""

from __future__ import annotations

import os
from pathlib import Path

from expunge.errors import InputError


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


def check_writable(output: Path, *, inside: bool = False) -> None:
    """Raises InputError where the output cannot be made or, `inside`, nothing can be put into it."""
    place = nearest(output if inside else output.absolute().parent)
    if not place.is_dir():
        raise InputError(f"--output {output}: {place} is a file; choose another place")
    if not os.access(place, os.W_OK):
        raise InputError(f"--output {output}: {place} cannot be written to; choose another place")
