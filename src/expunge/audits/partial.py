"""Finished attacks on disk: an interrupted audit goes on where it was, and what every audit of the same
target and oracle repeats is measured once.

One file an attack, model and request, named by a digest of all that its result follows from: another
model, row, setting or version gives another name, and nothing stale is ever read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expunge.audits.base import Found, ModelName
from expunge.disk import PART, check_writable, own, write_whole
from expunge.errors import InputError

SUFFIX = ".partial"
_NAME = re.compile(rf"\w+-(target|unlearned|oracle)-[0-9a-f]{{16}}\.json|{PART.pattern}")
REPEATED: tuple[ModelName, ...] = ("target", "oracle")
"""Models that the audits of several runs have in common."""


class Partial:
    """Where finished attacks are kept: beside the output until it is written, and, of the models that
    other audits attack too, in a directory that stays. Without either nothing is kept."""

    def __init__(self, output: Path | None, lasting: Path | None = None, *, reveal: bool) -> None:
        """`lasting` is the directory that stays; it holds scores by row id and no text."""
        self._directory = None if output is None else output.with_name(output.name + SUFFIX)
        if self._directory is not None and os.path.lexists(self._directory):
            own(self._directory, _holds_results)
        self._lasting = lasting
        self._reveal = reveal

    def read(self, facts: Mapping[str, Any]) -> Found | None:
        """What was found before on the same facts, or None."""
        digest = _digest(facts)
        for path in self._paths(facts, digest):
            try:
                kept = json.loads(path.read_text(encoding="utf-8"))
                if kept["facts"] == digest:
                    return self.write(facts, Found(**kept["found"]))
            except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
                continue  # not there, or cut off by what ended the run: it is measured again
        return None

    def write(self, facts: Mapping[str, Any], found: Found) -> Found:
        """Keeps a result and returns it as it will be read: the same whether resumed or not."""
        values = found.to_json(reveal=self._reveal)
        digest = _digest(facts)
        text = json.dumps({"facts": digest, "found": values}, indent=2) + "\n"
        for path in self._paths(facts, digest):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_whole(path, text, private=True)
        return Found(**json.loads(json.dumps(values)))

    def remove(self) -> None:
        """Deletes what was kept beside the output."""
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _paths(self, facts: Mapping[str, Any], digest: str) -> list[Path]:
        name = f"{facts['attack']}-{facts['model']}-{digest[:16]}.json"
        lasting = self._lasting if facts["model"] in REPEATED else None
        return [place / name for place in (self._directory, lasting) if place is not None]


def check_cache(directory: Path) -> None:
    """Raises InputError where nothing can be kept there."""
    if not directory.absolute().parent.is_dir():
        raise InputError(f"--cache {directory}: its directory does not exist; make it first")
    if directory.exists() and not directory.is_dir():
        raise InputError(f"--cache {directory}: is a file; name a directory")
    check_writable(directory, inside=True, option="--cache")


def _holds_results(directory: Path) -> bool:
    return all(_NAME.fullmatch(entry.name) for entry in directory.iterdir())


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
