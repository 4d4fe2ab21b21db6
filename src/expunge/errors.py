"""The ways a command can fail, and the exit code of each."""

from __future__ import annotations


class ExpungeError(Exception):
    """A failure that is explained by its one-line message alone."""

    exit_code = 1


class InputError(ExpungeError):
    """Wrong input or usage: names the file, row or option, what was found and the mend."""

    exit_code = 2


class RunError(ExpungeError):
    """A run that started and could not finish."""


class Interrupted(ExpungeError):
    """A run that was asked to stop and can be continued."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
