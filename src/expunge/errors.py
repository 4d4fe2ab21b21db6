"""The two ways a command can fail, and the exit code of each."""

from __future__ import annotations


class ExpungeError(Exception):
    """A failure that is explained by its one-line message alone."""

    exit_code = 1


class InputError(ExpungeError):
    """Wrong input or usage: names the file, row or option, what was found and the mend."""

    exit_code = 2


class RunError(ExpungeError):
    """A run that started and could not finish."""
