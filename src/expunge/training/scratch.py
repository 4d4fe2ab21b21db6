"""The hidden directory beside the output in which an unfinished run lives.

    .OUT.unfinished/
      run.json     what was asked for; a run is continued with the same only
      layer.json   the layer that was chosen, where that was left open
      output/      the run directory in the making, renamed to OUT at the end
      cache/       hidden states of rows
      state/       the last saved state
      replaced/    what OUT was before, while it is exchanged
      lock         held by the process at work

It holds activations of forget text, is readable by its owner only, and is gone when the run ends.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from expunge.disk import settle
from expunge.errors import ExpungeError, InputError, Interrupted
from expunge.processes import Processes
from expunge.training.state import SavedState, load_facts, load_state

_ASKED = "run.json"
_FORMAT = 2
"""Of what is in the directory; another number where a run of before could no longer be gone on with."""


class Scratch:
    """An unfinished run on disk."""

    def __init__(self, output: Path) -> None:
        self._final = output
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
        return self.is_marked("cache") or any(self.state.glob("*.safetensors"))

    def publish(self) -> None:
        """Renames the finished output to its name; what was there goes only afterwards."""
        self.output.chmod(0o755)
        self.mark("publishing")
        if self._final.exists():
            self._final.rename(self._replaced)
        try:
            self.output.rename(self._final)
        except OSError:
            if self._replaced.exists():
                self._replaced.rename(self._final)
            raise
        settle(self._final.absolute().parent)

    def put_back(self) -> None:
        """Undoes an exchange that was cut off in its middle."""
        if self._replaced.exists() and not self._final.exists():
            self._replaced.rename(self._final)


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
    found = scratch.root.exists()
    if found and not (resume or overwrite):
        raise InputError(
            f"--output {output}: an unfinished run is beside it ({_how_far(scratch)}); go on with"
            " --resume, or discard it with --overwrite"
        )
    scratch.root.mkdir(mode=0o700, exist_ok=True)
    finished = False
    with (scratch.root / "lock").open("w") as lock:
        _take(lock, output)
        scratch.put_back()
        if found and resume:
            _check_same(scratch.root, asked)
        else:
            _clear(scratch.root)
            _write_asked(scratch.root, asked)
        for directory in (scratch.output, scratch.cache, scratch.state):
            directory.mkdir(exist_ok=True)
        try:
            yield scratch
            finished = True
        except ExpungeError as error:
            # Anything else that is ours to say would be said again by a continued run.
            finished = not isinstance(error, Interrupted)
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


def _take(lock: IO[str], output: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise InputError(
            f"--output {output}: another process is at work on it; wait for it or choose another"
            " output"
        ) from None


def _check_same(root: Path, asked: Mapping[str, Any]) -> None:
    """Raises InputError that names the first setting in which a resumed run differs."""
    try:
        before = json.loads((root / _ASKED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        _clear(root)  # killed before it had begun
        _write_asked(root, asked)
        return
    if before.pop("format", None) != _FORMAT:
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
    before: Mapping[str, Any], now: Mapping[str, Any], prefix: str
) -> Iterator[tuple[str, Any, Any]]:
    """Every entry in which two records differ: its dotted name, and both values."""
    for key in [*before, *(key for key in now if key not in before)]:
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from differences(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key}", old, new


def _clear(root: Path) -> None:
    for path in root.iterdir():
        if path.name == "lock":
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _write_asked(root: Path, asked: Mapping[str, Any]) -> None:
    _write_whole(root / _ASKED, json.dumps({"format": _FORMAT, **asked}, indent=2))


def _write_whole(path: Path, text: str) -> None:
    unfinished = path.with_suffix(".part")
    unfinished.write_text(text, encoding="utf-8")
    settle(unfinished)
    unfinished.replace(path)
