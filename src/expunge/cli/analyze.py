"""`expunge analyze`: what is found out before or beside unlearning; one subcommand a file."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from expunge.cli.help import HELP
from expunge.errors import InputError

SUBCOMMANDS = {
    "layers": ("expunge.cli.analyze_layers", "which layer to steer, predicted from one pass"),
    "influence": ("expunge.cli.analyze_influence", "which rows matter, and which are at risk"),
}


def main(arguments: Sequence[str]) -> int:
    """Hands the arguments on to the subcommand that the first word names."""
    import sys

    given = list(arguments)
    if given[:1] and given[0] in HELP:
        width = max(map(len, SUBCOMMANDS))
        lines = [f"  {name.ljust(width)}  {about}" for name, (_, about) in SUBCOMMANDS.items()]
        sys.stdout.write("\n".join(["usage: expunge analyze SUBCOMMAND ...", "", *lines, ""]))
        return 0
    if not given or given[0] not in SUBCOMMANDS:
        known = ", ".join(f"expunge analyze {name} MODEL ..." for name in SUBCOMMANDS)
        raise InputError(f"analyze{f' {given[0]}' if given else ''}: no such subcommand; write {known}")
    return int(import_module(SUBCOMMANDS[given[0]][0]).main(given[1:]))
