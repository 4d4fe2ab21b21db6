"""The hidden directory beside the output in which an unfinished run lives.

    .OUT.unfinished/
      run.json     what was asked for; a run is continued with the same only
      layer.json   the layer that was chosen, where that was left open
      output/      the run directory in the making, renamed to OUT at the end
      cache/       hidden states of rows
      state/       the last saved state
      replaced/    what OUT was before, while it is exchanged
      lock         held by the process at work

It holds activations of forget text, is readable by its owner only, and is gone once the run is through.
Before, it goes only where the user says so: what interrupts a run may pass.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from expunge.disk import PART, check_writable, check_written, held, own, remove, settle, write_whole
from expunge.errors import InputError, NothingKept, RunError
from expunge.models.files import MANIFEST
from expunge.processes import Processes
from expunge.training.state import SavedState, load_facts, load_state

_BESIDE = (
    MANIFEST, "adapter", "trackers", "before.json", "oracle.json", "scores.json", "records.jsonl",
    "audit.json", "audit.json.partial", "report.html", "report.md", "report.json", ".expunge-*",
)  # fmt: skip
"""What is in a run directory beside the files that its record names: ours, or another command's."""
_ASKED = "run.json"
_FORMAT = 2
"""Of what is in the directory; another number where a run of before could no longer be gone on with."""


class Scratch:
    """An unfinished run on disk."""

    def __init__(self, output: Path) -> None:
        self._final = output
        self._before: object = None
        self.root = output.absolute().parent / f".{output.name}.unfinished"
        self.output = self.root / "output"
        self.cache = self.root / "cache"
        self.state = self.root / "state"
        self.layer = self.root / "layer.json"
        self._replaced = self.root / "replaced"

    def is_marked(self, mark: str) -> bool:
        """Whether a part of the work was done as a whole."""
        return (self.root / f"{mark}.done").is_file()

    def mark(self, mark: str) -> None:
        """Remembers that a part of the work is done."""
        (self.root / f"{mark}.done").touch()
        settle(self.root)

    def saved(self) -> SavedState | None:
        """The last state of the training."""
        return load_state(self.state)

    def facts(self) -> dict[str, Any] | None:
        """What JSON says of it."""
        return load_facts(self.state)

    @property
    def is_published(self) -> bool:
        """Whether the output was renamed to its name already, and only this directory was left."""
        return self.is_marked("publishing") and not self.output.exists() and self._final.exists()

    @property
    def worth_resuming(self) -> bool:
        """Whether a later run would start further on than at the beginning."""
        state = any(self.state.glob("*.safetensors"))
        return state or self.is_marked("cache") or self._replaced.exists()

    def prove(self) -> None:
        """Makes the directory, or proves that a run made it. Raises InputError."""
        own(self.root, _is_of_a_run)

    def look(self) -> None:
        """Remembers what is at the output's name, for `publish` to replace nothing else."""
        self._before = seen(self._final)

    def publish(self) -> None:
        """Renames the finished output to its name; what was there goes only afterwards.

        Raises RunError where that is not what `look` saw.
        """
        self.mark("publishing")
        changed = f"{self._final}: was made or changed by others during the run; move it away"
        try:
            if self._before is not None and os.path.lexists(self._final):
                self._final.rename(self._replaced)
                if seen(self._replaced) != self._before:
                    raise RunError(changed)
            self.output.rename(self._final)  # which does not take the place of what is there
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise RunError(changed) from None
            raise
        finally:
            self.put_back()
        settle(self._final.absolute().parent)

    def put_back(self) -> None:
        """Undoes an exchange that was cut off in its middle."""
        if self._replaced.exists() and not os.path.lexists(self._final):
            self._replaced.rename(self._final)


def seen(directory: Path) -> object:
    """The names, sizes and times of a directory's entries; None where nothing is there."""
    if not os.path.lexists(directory):
        return None
    entries = [(path.name, path.lstat()) for path in sorted(directory.iterdir())]
    return [(name, found.st_size, found.st_mtime_ns) for name, found in entries]


def check_output(output: Path, *, overwrite: bool) -> None:
    """Raises InputError for an output that cannot be written, or that holds what no run wrote."""
    if output.is_symlink():
        raise InputError(f"--output {output}: is a link; name the directory itself")
    if output.exists() and not overwrite:
        raise InputError(f"--output {output}: exists; choose another directory or give --overwrite")
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output}: is a file; choose a directory")
    if output.is_dir() and any(output.iterdir()):
        check_written("--output", output, [*_BESIDE, *map(glob.escape, _recorded(output))])
    check_writable(output)


def _recorded(output: Path) -> list[str]:
    """The files that a run wrote, as its record names them, and a card that is a report's alone."""
    try:
        names = list(json.loads((output / MANIFEST).read_text(encoding="utf-8"))["output_sha256"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise InputError(
            f"--output {output}: --overwrite replaces earlier runs only, and this holds no"
            f" {MANIFEST} of one; choose another directory"
        ) from None
    card = output / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    if text.startswith("<!-- expunge report: begin") and text.endswith("report: end -->\n"):
        names.append(card.name)
    return names


def _is_of_a_run(root: Path) -> bool:
    """Whether a run made a directory: one that was killed at once left a lock, and what it had begun to
    write, and no more."""
    entries = list(root.iterdir())
    if all(path.name == "lock" or PART.fullmatch(path.name) for path in entries):
        return not any(path.is_symlink() for path in entries)
    try:
        return "format" in json.loads((root / _ASKED).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


@contextmanager
def scratch_beside(
    output: Path, asked: Mapping[str, Any], *, resume: bool, overwrite: bool
) -> Iterator[Scratch]:
    """The scratch directory of a run, new or continued, locked; it stays only if worth resuming.

    Raises InputError where another process holds it, where it is of a run with other settings, or
    where there is one and neither resume nor overwrite says what to do with it.
    """
    scratch = Scratch(output)
    parent = output.absolute().parent
    made = [path for path in (parent, *parent.parents) if not path.exists()]
    parent.mkdir(parents=True, exist_ok=True)
    found = os.path.lexists(scratch.root)
    if found:
        scratch.prove()
    if found and not (resume or overwrite):
        raise InputError(
            f"--output {output}: an unfinished run is beside it ({_how_far(scratch)}); go on with"
            " --resume, or discard it with --overwrite"
        )
    scratch.prove()
    busy = f"--output {output}: another process is at work on it; wait for it or choose another"
    finished = False
    with held(scratch.root / "lock", busy):
        scratch.put_back()
        try:
            check_output(output, overwrite=overwrite)
            scratch.look()
            if found and resume:
                _check_same(scratch.root, asked)
            else:
                _begin(scratch.root, asked)
            for directory in (scratch.output, scratch.cache, scratch.state):
                directory.mkdir(exist_ok=True)
            yield scratch
            finished = True
        except NothingKept:  # a continued run would say the same
            finished = True
            raise
        finally:
            if finished or not scratch.worth_resuming:
                scratch.put_back()
                shutil.rmtree(scratch.root, ignore_errors=True)
                for directory in made:
                    if directory.is_dir() and not any(directory.iterdir()):
                        directory.rmdir()


@contextmanager
def shared_scratch(
    processes: Processes, output: Path, asked: Mapping[str, Any], *, resume: bool, overwrite: bool
) -> Iterator[Scratch]:
    """The same for several processes on one file system: the main one makes it, holds and ends it."""
    if processes.is_main:
        with ExitStack() as stack:
            try:
                scratch = stack.enter_context(
                    scratch_beside(output, asked, resume=resume, overwrite=overwrite)
                )
            except BaseException as error:
                processes.gather(str(error))
                raise
            processes.gather(None)
            yield scratch
    else:
        refused = processes.gather(None)[0]
        if refused is not None:
            raise InputError(refused)
        yield Scratch(output)


def _how_far(scratch: Scratch) -> str:
    facts = scratch.facts()
    if facts is None:
        return "no step is saved yet"
    return f"step {facts['step']} of {facts['steps']} is saved"


def _check_same(root: Path, asked: Mapping[str, Any]) -> None:
    """Raises InputError that names the first setting in which a resumed run differs."""
    try:
        before = json.loads((root / _ASKED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = {"format": None}
    if (version := before.pop("format", None)) is None:
        _begin(root, asked)  # killed before it had begun
        return
    if version != _FORMAT:
        raise InputError(
            "--resume: the unfinished run is of another version of expunge; go on with that version, or"
            " discard it with --overwrite and no --resume"
        )
    now = json.loads(json.dumps(asked))
    for name, old, new in differences(before, now, ""):
        raise InputError(
            f"--resume: the unfinished run had {name} {json.dumps(old)}, this one has"
            f" {json.dumps(new)}; give the same, or discard it with --overwrite and no --resume"
        )


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], prefix: str, joint: str = "."
) -> Iterator[tuple[str, Any, Any]]:
    """Every entry in which two records differ: its name, parts `joint`ed, and both values."""
    for key in [*before, *(key for key in now if key not in before)]:
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from differences(old, new, f"{prefix}{key}{joint}", joint)
        elif old != new:
            yield f"{prefix}{key}", old, new


def _begin(root: Path, asked: Mapping[str, Any]) -> None:
    """Empties the directory, which says all the while whose it is and that nothing in it counts."""
    write_whole(root / _ASKED, json.dumps({"format": None}))
    for path in root.iterdir():
        if path.name not in ("lock", _ASKED):
            remove(path)
    write_whole(root / _ASKED, json.dumps({"format": _FORMAT, **asked}, indent=2))
