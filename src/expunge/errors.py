"""The ways a command can fail, and the exit code of each."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable


class ExpungeError(Exception):
    """A failure that is explained by its one-line message alone."""

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        # Options are fields; a message has them as they are written on the command line.
        super().__init__(
            re.sub(r"(?<![\w/.-])--[a-z][\w.-]*", lambda m: m[0].replace("_", "-"), message)
        )


class InputError(ExpungeError):
    """Wrong input or usage: names the file, row or option, what was found and the mend."""

    exit_code = 2


class RunError(ExpungeError):
    """A run that started and could not finish."""


class NothingKept(RunError):
    """A run that came to its end without a result; to go on with it would say the same."""


class RefusedRun(InputError, NothingKept):
    """Wrong input that only the loaded model could show; to go on with the run would say the same."""


class Interrupted(ExpungeError):
    """A run that was asked to stop and can be continued."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def place_of(error: BaseException) -> str:
    """Type, file and line of an error: what may be said of one whose message can quote a row."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return type(error).__name__
    file = trace.tb_frame.f_code.co_filename.rsplit("/", 1)[-1]
    return f"{type(error).__name__} in {file} line {trace.tb_lineno}"


def is_out_of_memory(error: BaseException) -> bool:
    """Of the machine, which torch says in words, or of the device."""
    named = type(error).__name__ in ("MemoryError", "OutOfMemoryError")
    named = named or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    return named or (type(error) is RuntimeError and "can't allocate memory" in str(error))


def is_failure(error: BaseException) -> bool:
    """Of a tokenizer: tokenizers' patterns end in a panic of Rust's, which is no Exception."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def install(extra: str) -> str:
    """The command that adds an optional part. No package of the name expunge is published."""
    return f"run pip install '.[{extra}]' in the clone of expunge"


def near(given: str, known: Iterable[str], otherwise: str = "") -> str:
    """The mend for a name that is none of the known: the nearest, or what to do otherwise."""
    known = list(known)
    found = difflib.get_close_matches(given, known, n=1, cutoff=0.5)
    return f"did you mean {found[0]}?" if found else otherwise or f"choose from {', '.join(known)}"


def check_seed(seed: int) -> None:
    """Raises InputError for a seed that not every generator takes."""
    if not 0 <= seed < 2**32:
        raise InputError(f"--seed {seed}: must be in [0, 2^32)")
