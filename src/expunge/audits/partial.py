"""Finished attacks on disk, so that an interrupted audit goes on where it was.

One file an attack, model and request, named by a digest of all that its result follows from: another
model, row, setting or version gives another name, and nothing stale is ever read.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expunge.audits.base import Found

SUFFIX = ".partial"


class Partial:
    """The directory beside the output; None of it is used where there is no output."""

    def __init__(self, output: Path | None, *, reveal: bool) -> None:
        self._directory = None if output is None else output.with_name(output.name + SUFFIX)
        self._reveal = reveal

    def read(self, facts: Mapping[str, Any]) -> Found | None:
        """What was found before on the same facts, or None."""
        path = self._path(facts)
        if path is None or not path.is_file():
            return None
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["facts"] != _plain(facts):
                return None
            return Found(**kept["found"])
        except (ValueError, KeyError, TypeError):
            return None  # cut off by what ended the run; it is measured again

    def write(self, facts: Mapping[str, Any], found: Found) -> Found:
        """Keeps a result and returns it as it will be read: the same whether resumed or not."""
        values = found.to_json(reveal=self._reveal)
        path = self._path(facts)
        if path is not None:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            whole(path, {"facts": _plain(facts), "found": values})
        return Found(**json.loads(json.dumps(values)))

    def remove(self) -> None:
        """Deletes everything kept."""
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _path(self, facts: Mapping[str, Any]) -> Path | None:
        if self._directory is None:
            return None
        digest = hashlib.sha256(json.dumps(_plain(facts), sort_keys=True).encode()).hexdigest()
        return self._directory / f"{facts['attack']}-{facts['model']}-{digest[:16]}.json"


def whole(path: Path, values: Mapping[str, Any]) -> None:
    """Writes JSON that is there as a whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(facts))
