"""How a run's state is saved while it works, and what is said where it ends early."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from expunge.disk import explained
from expunge.errors import ExpungeError, Interrupted, NothingKept, RunError
from expunge.models.sharding import whole
from expunge.runs.manifest import finite
from expunge.runs.scratch import Scratch
from expunge.training.loop import Stopped
from expunge.training.state import SavedState, save_state
from expunge.training.stopping import StopRequest

_SAVE_SECONDS = 15.0


class Keeper:
    """Saves the loop's state and its metrics so that they agree; of several processes one writes."""

    def __init__(self, scratch: Scratch, stop: StopRequest, every: int | None, *, writes: bool) -> None:
        self._scratch, self._stop, self._every, self._writes = scratch, stop, every, writes
        self._metrics: IO[str] | None = None
        self._saved_at = time.monotonic()
        self._save_seconds = 0.0
        facts = scratch.facts()
        self.resumed_from: list[int] = []
        if facts is not None:
            self.resumed_from = [*facts["resumed_from"], facts["step"]]

    @property
    def stop_requested(self) -> bool:
        """Whether a signal asked this process to stop."""
        return self._stop.requested

    @contextmanager
    def metrics(self, path: Path, saved: SavedState | None) -> Iterator[None]:
        """Has the metrics open, for lines after those that the saved state knows of."""
        if not self._writes:
            yield
            return
        with path.open("a", encoding="utf-8") as self._metrics:
            self._metrics.truncate(0 if saved is None else saved.facts["metrics_bytes"])
            self._metrics.seek(0, os.SEEK_END)
            yield

    def log(self, entry: Mapping[str, Any]) -> None:
        """Writes one line to the metrics."""
        if self._metrics is not None:
            self._metrics.write(json.dumps(finite(entry), allow_nan=False) + "\n")
            self._metrics.flush()

    def mark_cache(self) -> None:
        """Remembers that the cache is complete."""
        if self._writes:
            self._scratch.mark("cache")

    def due(self, step: int) -> bool:
        """Every so many steps, or so rarely that it takes at most a twentieth of the time."""
        if self._every is not None:
            return step % self._every == 0
        waited = time.monotonic() - self._saved_at
        return waited > max(_SAVE_SECONDS, 20 * self._save_seconds)

    def save(self, facts: Mapping[str, Any], groups: Mapping[str, Mapping[str, Any]]) -> None:
        """Saves the state with the length of the metrics at this moment."""
        self._stop.can_resume = True
        if self._metrics is None:
            for members in groups.values():
                for tensor in members.values():
                    whole(tensor)  # as the one that writes does
            return
        started = time.monotonic()
        place = {"metrics_bytes": self._metrics.tell(), "resumed_from": self.resumed_from}
        save_state(self._scratch.state, {**finite(facts), **place}, groups)
        self._saved_at = time.monotonic()
        self._save_seconds = self._saved_at - started


@contextmanager
def plain_errors(scratch: Scratch, stop: StopRequest) -> Iterator[None]:
    """Says of an interruption, a full disk, a file that is away, what was saved and how to go on."""

    def way_on() -> str:
        if not scratch.worth_resuming:
            return "nothing was kept"
        facts = scratch.facts()
        kept = "the cache is kept" if facts is None else f"step {facts['step']} is saved"
        return (
            f"{kept}: go on with the same command and --resume, or discard it by removing {scratch.root}"
        )

    try:
        yield
    except (Interrupted, NothingKept):
        raise
    except ExpungeError as error:
        if not scratch.worth_resuming:
            raise
        raise Interrupted(f"{error}; {way_on()}", error.exit_code) from None
    except Stopped as stopped:
        raise Interrupted(f"{stopped}; {way_on()}", stop.exit_code) from None
    except KeyboardInterrupt:
        if not scratch.worth_resuming:
            raise
        raise Interrupted(f"interrupted; {way_on()}", stop.exit_code) from None
    except OSError as error:
        if error.errno is None:
            error.add_note(way_on())
            raise
        raise Interrupted(f"{explained(error)}; {way_on()}", RunError.exit_code) from None
    except Exception as error:
        error.add_note(way_on())
        raise
