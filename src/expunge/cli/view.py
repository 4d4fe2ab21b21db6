"""`expunge view`: a page with target and unlearned model side by side."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from expunge.cli.console import progress_on_stderr
from expunge.cli.options import parse
from expunge.processes import check_alone
from expunge.web.inputs import ViewInputs
from expunge.web.serving import serve


@dataclass(frozen=True)
class View(ViewInputs):
    """expunge view RUN [--forget F --retain R] [--reveal] [--port P]

    Shows a page on this machine. Asks both models side by side, with the probability of every
    token. Shows the rows with masked text, and the report. Prints its address and runs until Ctrl-C.
    Needs no network.
    """


def main(arguments: Sequence[str]) -> int:
    """Parses, checks, serves."""
    settings = parse(View, arguments, "expunge view", "run", ("original",))
    check_alone("view")
    serving = False

    def ready(url: str, locked: bool) -> None:
        nonlocal serving
        serving = True
        who = "asks for the password" if locked else "open to everyone on this machine"
        sys.stdout.write(f"{url} ({who}; Ctrl-C stops it)\n")
        sys.stdout.flush()

    try:
        with progress_on_stderr() as progress:
            serve(settings, ready, progress.phase)
    except KeyboardInterrupt:
        if not serving:
            raise
    return 0
