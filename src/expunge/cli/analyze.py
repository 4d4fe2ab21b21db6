"""`expunge analyze`: hands on to the analysis that its first word names."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from expunge.errors import InputError

ANALYSES = {
    "influence": "expunge.cli.analyze_influence",
}


def main(arguments: Sequence[str]) -> int:
    """Runs one analysis. Raises InputError for an unknown one."""
    words = " | ".join(ANALYSES)
    if not arguments or arguments[0] not in ANALYSES:
        if arguments and arguments[0] in ("-h", "--help"):
            import sys

            sys.stdout.write(f"usage: expunge analyze {words} MODEL ...; --help after the word\n")
            return 0
        raise InputError(f"analyze: needs one of {words} first; write expunge analyze WORD MODEL")
    code: int = import_module(ANALYSES[arguments[0]]).main(arguments[1:])
    return code
