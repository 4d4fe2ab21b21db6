"""Hidden states of rows that one run hands to the next, whose segment lies higher.

Below the segment nothing is trained, so that of two runs on the same rows the one at the higher layer
can begin where the other's states are instead of at the embeddings. The file changes hands: it is moved,
never copied, and there is no more on disk than one run's cache.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from expunge.disk import write_whole

if TYPE_CHECKING:
    from expunge.segments.cache_layout import CacheLayout


class Prefix:
    """States below a layer in a directory of their own, from run to run."""

    def __init__(self, directory: Path) -> None:
        """The directory must be there, on the file system of the runs' caches."""
        self._states = directory / "states"
        self._facts = directory / "states.json"

    def take(self, cache: CacheLayout, first: int, place: Path) -> int:
        """Moves what is kept to `place` and returns the layer it lies below; 0 where nothing serves.

        Serves what was kept of the same rows in the same dtype below layer `first` or one before it.
        """
        if not (self._facts.is_file() and self._states.is_file()):
            return 0
        kept = json.loads(self._facts.read_text(encoding="utf-8"))
        if kept["rows"] != _fingerprint(cache) or not 0 < kept["below"] <= first:
            return 0
        # Without the facts the file is nobody's: what is cut off from here on begins at the embeddings.
        self._facts.unlink()
        self._states.replace(place)
        return int(kept["below"])

    def keep(self, cache: CacheLayout, first: int, place: Path) -> None:
        """Gives the states at `place`, which are read only from here on, a second name here."""
        if first == 0:
            return
        self._facts.unlink(missing_ok=True)
        self._states.unlink(missing_ok=True)
        os.link(place, self._states)
        write_whole(self._facts, json.dumps({"below": first, "rows": _fingerprint(cache)}))


def _fingerprint(cache: CacheLayout) -> str:
    """One digest of which rows are kept where, and in which numbers."""
    digest = hashlib.sha256(f"{cache.width} {cache.dtype}".encode())
    for ids, slot in cache.slots.items():
        digest.update(f"{slot.start} {ids}\n".encode())
    return digest.hexdigest()
